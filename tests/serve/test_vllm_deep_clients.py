"""A deep-fusion model in a real vLLM: clients that leave and images that are broken trouble nobody else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.vllm_clients import assert_broken_images_are_harmless, assert_leaving_is_harmless, broken_urls
from tests.serve.vllm_models import Oracle, build
from tests.serve.vllm_server import Server, serving
from vlm import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KIND = "deep, perceiver, all images"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build(folder, KIND)
    return folder


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(*load(model))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("here")) as running:
        yield running


def test_clients_that_leave(server: Server, oracle: Oracle) -> None:
    assert_leaving_is_harmless(server, oracle, 40)


def test_broken_images(server: Server, oracle: Oracle) -> None:
    assert_broken_images_are_harmless(server, oracle, len(broken_urls()))
