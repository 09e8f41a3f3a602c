"""A deep-fusion model in a real vLLM, troubled for long by clients that leave and by images that are broken."""

from pathlib import Path

import pytest

from tests.serve.vllm_clients import assert_broken_images_are_harmless, assert_leaving_is_harmless
from tests.serve.vllm_models import Oracle, build
from tests.serve.vllm_server import serving
from vlm import load

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", ["deep, perceiver, all images", "deep, mlp"])
def test_many_leave_and_many_images_are_broken(kind: str, tmp_path: Path) -> None:
    build(tmp_path / "model", kind)
    oracle = Oracle(*load(tmp_path / "model"))
    with serving(tmp_path / "model", tmp_path) as server:
        assert_leaving_is_harmless(server, oracle, 500)
        assert_broken_images_are_harmless(server, oracle, 200)
