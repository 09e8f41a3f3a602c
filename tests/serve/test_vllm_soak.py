"""More kinds of models in a real vLLM, and the layers of one model dealt over two processes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.test_vllm import EARLY, IN_CI, assert_images_matter, assert_kind_is_served
from tests.serve.vllm_models import Oracle, add_adapter, assert_same_tokens, build, cases
from tests.serve.vllm_server import FLAGS, serving
from vlm import load
from vlm.cli import main

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", [kind for kind in EARLY if kind not in (*IN_CI, "mlp", "llava", "llava next")])
def test_a_kind_says_the_same_as_our_own(kind: str, tmp_path: Path) -> None:
    assert_kind_is_served(kind, tmp_path)


@pytest.mark.parametrize("kind", IN_CI)
def test_two_ranks_say_the_same_as_our_own(kind: str, tmp_path: Path) -> None:
    assert_kind_is_served(kind, tmp_path, (*FLAGS, "--tensor-parallel-size", "2"), cores="0|1")


def test_lora_of_a_connector_of_tiles_is_each_images_own(tmp_path: Path) -> None:
    build(tmp_path / "model", IN_CI[0])
    add_adapter(tmp_path / "model", tmp_path / "dogs", r"multi_modal_projector\.layers\.[024]")
    oracles = {name: Oracle(*load(tmp_path / name)) for name in ("model", "dogs")}
    asked = cases(30)
    differ = [oracles["model"].answer(case) != oracles["dogs"].answer(case) for case in asked if case.images]
    assert sum(differ) > len(differ) / 2
    with serving(tmp_path / "model", tmp_path, "--adapter", f"dogs={tmp_path / 'dogs'}") as server:
        with ThreadPoolExecutor(2) as pool:
            base, adapted = pool.map(lambda name: server.ask(asked, model=name), ("tiny", "dogs"))
        assert_same_tokens(oracles["model"], asked, base)
        assert_same_tokens(oracles["dogs"], asked, adapted)


@pytest.mark.parametrize("kind", ["llava", "llava next"])
def test_vllms_own_class_says_the_same_of_an_export(kind: str, tmp_path: Path) -> None:
    build(tmp_path / "model", kind)
    oracle, asked = Oracle(*load(tmp_path / "model")), cases()
    assert_images_matter(oracle)
    assert main(["export", str(tmp_path / "model"), "--to", "llava-hf", "--out", str(tmp_path / "exported")]) == 0
    with serving(tmp_path / "exported", tmp_path) as server:
        assert_same_tokens(oracle, asked, server.ask(asked))


def test_a_compiled_model_says_the_same_as_our_own(tmp_path: Path) -> None:
    assert_kind_is_served("mlp", tmp_path, ("--max-model-len", "512"))
