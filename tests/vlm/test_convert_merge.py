"""Adapters leave merged, over a quantised base, too; one that doesn't fit is an error."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from tests.conftest import build_tiny_model
from tests.vlm.chats import user
from tests.vlm.test_convert_llava import give, held, ours, theirs
from vlm import UserError, VisionLanguageModel, load
from vlm.convert.merge import dequantise

TARGETS = r"language_model\..*\.(q_proj|down_proj)|multi_modal_projector\.layers\.0"


def train_lora(base: Path, folder: Path, model: Any = None, std: float = 0.2, **settings: Any) -> Path:
    """An adapter over a base whose weights aren't zero."""
    torch.manual_seed(0)
    lora = get_peft_model(model or load(base)[0], LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **settings))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_models: Callable[[str, str], Path], tmp_path: Path) -> Path:
    return train_lora(tiny_models("early", "mlp"), tmp_path / "adapter")


def by_hand(base: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """W + alpha / r * B A in float64, rounded once to the base's format."""
    lora = load_file(adapter / "adapter_model.safetensors")
    merged = dict(base)
    for name in base:
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in lora:
            a, b = (lora.pop(f"{prefix}{which}.weight").double() for which in "AB")
            merged[name] = (base[name].double() + 6 / 3 * torch.einsum("or,ri->oi", b, a)).to(base[name].dtype)
    assert lora == {}
    return merged


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance)


def test_an_adapter_leaves_merged(adapter: Path, tiny_models: Callable[[str, str], Path], tmp_path: Path) -> None:
    base = tiny_models("early", "mlp")
    exported = give(adapter, tmp_path / "out", to="vlm")
    assert_near(held(exported), by_hand(held(base), adapter))
    assert (ours(exported) - ours(base)).abs().max() > 1e-2
    as_llava = give(adapter, tmp_path / "llava")
    torch.testing.assert_close(theirs(as_llava), ours(exported), rtol=0, atol=1e-5)
    assert "an adapter merged in" in (as_llava / "README.md").read_text()


@pytest.mark.usefixtures("bf16_attention")
def test_merging_rounds_once(tiny_models: Callable[[str, str], Path], tmp_path: Path) -> None:
    model, processor = load(tiny_models("early", "mlp"), dtype=torch.bfloat16)
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    adapter = train_lora(base, tmp_path / "adapter")
    exported = give(adapter, tmp_path / "out", to="vlm")
    expected = by_hand(held(base), adapter)
    wrong = {name: int((held(exported)[name] != expected[name]).sum()) for name in expected}
    assert sum(wrong.values()) <= 2, wrong  # float32 and float64 may fall on either side of a tie


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"rank_pattern": {"q_proj": 5}}], ids=str)
def test_other_adapters_leave_merged_too(
    tiny_models: Callable[[str, str], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = tiny_models("early", "mlp")
    adapter = train_lora(base, tmp_path / "adapter", **settings)
    exported = give(adapter, tmp_path / "out", to="vlm")
    model, processor = load(base)
    apart = PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = processor.chat.encode(user("what is this?")).input_ids
    with torch.no_grad():
        expected = apart(input_ids=torch.tensor([ids])).logits
        got = load(exported)[0](input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # DoRA divides by norms: 6.4e-6 was seen


def respell(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        held = load_file(adapter / "adapter_model.safetensors")
        change(held)
        save_file(held, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    return spoil


NAME = "base_model.model.multi_modal_projector.layers.0.lora_A.weight"


def widen(held: dict[str, torch.Tensor]) -> None:
    held[NAME] = torch.zeros(3, 99)


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor less": (respell(lambda held: held.pop(NAME)), "lacks 1 tensors, the first is .*projector.*lora_A"),
    "a tensor more": (
        respell(lambda held: held.update({NAME.replace("layers.0", "layers.7"): held[NAME].clone()})),
        "its base model has no place for, 1 tensors",
    ),
    "another width": (respell(widen), "doesn't fit its base model"),
    "no base": (lambda a: edit(a, base_model_name_or_path=None), "doesn't name its base model"),
    "a base that is gone": (lambda a: edit(a, base_model_name_or_path="/none"), "/none: no such model folder"),
    "a base that is an adapter": (lambda a: edit(a, base_model_name_or_path=str(a)), "is an adapter, too"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_an_adapter_that_doesnt_fit_is_an_error(adapter: Path, tmp_path: Path, what: str) -> None:
    spoil, complaint = SPOILED[what]
    spoil(adapter)
    for command in (lambda: load(adapter), lambda: give(adapter, tmp_path / "out")):
        with pytest.raises(UserError, match=complaint):
            command()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (vlm[quant])")
def test_an_adapter_over_a_quantised_base_is_merged_in_full_precision(tiny_tokenizer: Any, tmp_path: Path) -> None:
    # bitsandbytes' CPU layers take only widths that are multiples of its blocks of 64
    base, quantised = tmp_path / "base", tmp_path / "quantised"
    build_tiny_model(base, tiny_tokenizer, "early", "mlp", intermediate_size=128)
    _, processor = load(base)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )
    VisionLanguageModel.from_pretrained(base, quantization_config=nf4).save_pretrained(quantised)
    processor.save_pretrained(quantised)
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in held(quantised))
    adapter = train_lora(quantised, tmp_path / "adapter", load(quantised)[0])

    plain = held(give(quantised, tmp_path / "plain", to="vlm"))
    assert plain.keys() == held(base).keys()
    level = nf4_levels()
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    block = plain[name].flatten()[:64]
    shares = block / block.abs().max()
    assert (shares[:, None] - level).abs().amin(1).max() < 1e-6  # float32 values of NF4's sixteen levels
    assert 0.01 < (plain[name] - held(base)[name]).abs().max() < 0.2

    exported = give(adapter, tmp_path / "out")
    merged = held(give(adapter, tmp_path / "merged", to="vlm"))
    assert_near(merged, by_hand(plain, adapter))
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    assert theirs(exported).shape == ours(tmp_path / "merged").shape
    torch.testing.assert_close(theirs(exported), ours(tmp_path / "merged"), rtol=0, atol=1e-5)


def nf4_levels() -> torch.Tensor:
    """Table of the QLoRA paper, appendix E."""
    levels = """
        -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
        -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
        0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
    """
    return torch.tensor([float(level) for level in levels.split()])


def test_another_quantisation_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="another way than bitsandbytes' 4 bit"):
        dequantise(torch.nn.Linear(2, 2))
