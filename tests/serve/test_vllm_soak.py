"""More kinds of models in a real vLLM, and the layers of one model dealt over two processes."""

from pathlib import Path

import pytest

from tests.serve.test_vllm import IN_CI, assert_kind_is_served
from tests.serve.vllm_models import KINDS
from tests.serve.vllm_server import FLAGS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_CI])
def test_a_kind_says_the_same_as_our_own(kind: str, tmp_path: Path) -> None:
    assert_kind_is_served(kind, tmp_path)


@pytest.mark.parametrize("kind", IN_CI)
def test_two_ranks_say_the_same_as_our_own(kind: str, tmp_path: Path) -> None:
    assert_kind_is_served(kind, tmp_path, (*FLAGS, "--tensor-parallel-size", "2"), cores="0|1")


def test_a_compiled_model_says_the_same_as_our_own(tmp_path: Path) -> None:
    assert_kind_is_served("mlp", tmp_path, ("--max-model-len", "512"))
