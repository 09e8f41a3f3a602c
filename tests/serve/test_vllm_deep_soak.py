"""Deep fusion in a real vLLM, in full: both kinds of attention, connectors, modes and intervals, whatever happens."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from serve.vllm_plugin.names import DEEP_LANGUAGE_MODELS
from tests.serve.test_vllm import assert_kind_is_served
from tests.serve.test_vllm_deep import CROWDED, EAGER, LIMIT, ask_all
from tests.serve.vllm_clients import assert_broken_images_are_harmless, assert_leaving_is_harmless
from tests.serve.vllm_models import GATED, KINDS, Oracle, add_adapter, assert_same_tokens, build, cases
from tests.serve.vllm_server import FLAGS, serving
from vlm import load

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]
PERCEIVER = {"type": "perceiver", "num_latents": 5, "heads": 2, "head_dim": 16}
# vLLM makes three groups of layers of these and the gated ones, and the states of a request lie in several of them
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
# head sizes that vLLM has kernels for on a CPU; Gemma's sliding windows are shorter than the prompts
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "phi3": {},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 64, "layer_types": MIXED},
}


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a kind of model, under the name "deep", for a test."""

    def add(attend: str = "last", every: int = 1, without: str = "apply", **settings: Any) -> str:
        gated = {**GATED, "every": every, "attend": attend, "ffn_without_media": without}
        monkeypatch.setitem(KINDS, "deep", {"fusion": "deep", "cross_attention": gated, **settings})
        return "deep"

    return add


def combinations() -> list[tuple[str, int, str, dict[str, Any], bool, bool]]:
    """Eight in which every two of the settings meet in all four ways (an orthogonal array of strength two)."""
    rows = []
    for a, b, c in product((0, 1), repeat=3):
        attend, every, without = ("last", "all")[a], (1, 2)[b], ("apply", "zero")[b ^ c]
        rows.append((attend, every, without, (PERCEIVER, {})[c], bool(a ^ b), bool(a ^ c)))
    return rows


@pytest.mark.parametrize(("attend", "every", "without", "connector", "compiled", "crowded"), combinations())
def test_two_hundred_questions(
    attend: str,
    every: int,
    without: str,
    connector: dict[str, Any],
    compiled: bool,
    crowded: bool,
    deep: Any,
    tmp_path: Path,
) -> None:
    kind = deep(attend, every, without, connector=connector)
    flags = (*(() if compiled else EAGER), *(CROWDED if crowded else ()))
    ask_all(tmp_path, kind, flags, count=200, max_tokens=200)


@pytest.mark.parametrize("language", DEEP_LANGUAGE_MODELS)
def test_a_language_model_says_the_same(language: str, deep: Any, tmp_path: Path) -> None:
    text = {"model_type": language, **LANGUAGES[language]}
    every = 1 if "layer_types" in text else 2
    assert_kind_is_served(deep(every=every, text_config=text), tmp_path, (*LIMIT, *EAGER))


@pytest.mark.parametrize("mode", ["anyres", "tiles"])
def test_tiles_say_the_same(mode: str, deep: Any, tmp_path: Path) -> None:
    connector = PERCEIVER if mode == "tiles" else {"pool": 2}
    assert_kind_is_served(deep(connector=connector, tiling={"mode": mode}), tmp_path, (*LIMIT, *EAGER))


@pytest.mark.parametrize("attend", ["last", "all"])
def test_two_ranks_say_the_same(attend: str, deep: Any, tmp_path: Path) -> None:
    kind = deep(attend, connector=PERCEIVER, text_config={"model_type": "llama", "num_key_value_heads": 2})
    assert_kind_is_served(kind, tmp_path, (*LIMIT, *EAGER, "--tensor-parallel-size", "2"), cores="0|1")


def test_blocks_that_cannot_be_cut_are_whole_on_both_ranks(deep: Any, tmp_path: Path) -> None:
    kind = deep(every=2)
    KINDS[kind]["cross_attention"]["heads"] = 3
    assert_kind_is_served(kind, tmp_path, (*LIMIT, *EAGER, "--tensor-parallel-size", "2"), cores="0|1")


def test_lora_of_the_language_model_is_served_beside_its_base(deep: Any, tmp_path: Path) -> None:
    build(tmp_path / "model", deep())
    add_adapter(tmp_path / "model", tmp_path / "cats", r"language_model\..*\.(q_proj|v_proj|down_proj)")
    oracles = {name: Oracle(*load(tmp_path / name)) for name in ("model", "cats")}
    asked = cases(30, 4)
    assert sum(oracles["model"].answer(case) != oracles["cats"].answer(case) for case in asked) > 15
    adapter = f"cats={tmp_path / 'cats'}"
    with (
        serving(tmp_path / "model", tmp_path, "--adapter", adapter, flags=FLAGS) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        base, adapted = pool.map(lambda name: server.ask(asked, model=name), ("tiny", "cats"))
    assert_same_tokens(oracles["model"], asked, base)
    assert_same_tokens(oracles["cats"], asked, adapted)


@pytest.mark.parametrize("kind", ["deep, perceiver, all images", "deep, mlp"])
def test_many_leave_and_many_images_are_broken(kind: str, tmp_path: Path) -> None:
    build(tmp_path / "model", kind)
    oracle = Oracle(*load(tmp_path / "model"))
    with serving(tmp_path / "model", tmp_path) as server:
        assert_leaving_is_harmless(server, oracle, 500)
        assert_broken_images_are_harmless(server, oracle, 200)


def test_a_quantised_language_model_says_nearly_the_same(deep: Any, tmp_path: Path) -> None:
    build(tmp_path / "model", deep(every=2))
    oracle, asked = Oracle(*load(tmp_path / "model"), max_tokens=1), cases(40, 4)
    flags = (*LIMIT, *EAGER, "--dtype", "bfloat16", "--quantization", "int8_per_channel_weight_only")
    with serving(tmp_path / "model", tmp_path, flags=flags) as server:
        got = server.ask(asked, max_tokens=1)
        assert "1.5 is rounding" in server.log.read_text(), "the self-test knows of no quantisation"
    same = [oracle.answer(case).output == output for case, (_, output) in zip(asked, got, strict=True)]
    assert sum(same) >= 34, same
