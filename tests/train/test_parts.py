"""What learns is what the recipe names: no more, no less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.recipes import chat_recipe, write_recipe
from train.adapters import add_lora, draw_anew, target_modules
from train.loop import run_training
from train.parts import assert_only_these_learn, make_optimizer, manifest, split_into_parts
from train.recipe import Lora, Stage, load_recipe
from vlm.checkpoint import load
from vlm.errors import UserError


def chat_stage(rates: dict[str, float], lora: Lora | None = None) -> Stage:
    return Stage("chat", "chat", ({"path": "x"},), rates, 1, lora=lora)  # type: ignore[arg-type]


def test_every_parameter_is_in_one_part_and_only_named_parts_learn(tiny_models: Any) -> None:
    model, _ = load(tiny_models("deep", "perceiver"))
    stage = chat_stage({"connector": 1e-3, "cross_attention": 1e-4, "gates": 1e-2})
    parts = split_into_parts(model, stage)
    assert sum(part.size for part in parts) == sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(parts, stage)
    assert_only_these_learn(model, parts, optimizer)
    rates = {name: rate for name, _, rate in manifest(parts)}
    assert rates == {
        "vision_tower": 0,
        "language_model": 0,
        "connector": 1e-3,
        "cross_attention": 1e-4,
        "gates": 1e-2,
    }
    assert {group["part"] for group in optimizer.param_groups} == {"connector", "cross_attention", "gates"}
    next(model.vision_tower.parameters()).requires_grad_(True)
    with pytest.raises(AssertionError, match="disagree about what learns"):
        assert_only_these_learn(model, parts, optimizer)


def test_a_rate_for_a_part_that_the_model_lacks_is_refused(tiny_models: Any) -> None:
    model, _ = load(tiny_models("early", "mlp"))
    with pytest.raises(ValueError, match=r"\.learning_rates\.gates: this model has no such part; it has connector, "):
        split_into_parts(model, chat_stage({"gates": 1e-3}))


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_lora_reaches_exactly_the_named_layers_of_the_language_model(tiny_models: Any, fusion: str) -> None:
    model, _ = load(tiny_models(fusion, "mlp"))
    names = dict(model.named_modules())
    expected = [
        f"language_model.model.layers.{layer}.{block}"
        for layer in range(3)
        for block in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    ]
    assert sorted(target_modules(model, ())) == sorted(expected)
    assert sorted(target_modules(model, ("q_proj",))) == [name for name in sorted(expected) if "q_proj" in name]
    with pytest.raises(UserError, match="has no qkv"):
        target_modules(model, ("qkv",))
    add_lora(model, Lora(rank=2, targets=("q_proj", "v_proj")))
    touched = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert touched == {name for name in expected if name.endswith(("q_proj", "v_proj"))}
    assert all(isinstance(names[name], nn.Linear) for name in expected)


def test_reset_draws_exactly_the_named_layers_anew(tiny_models: Any) -> None:
    model, _ = load(tiny_models("deep", "perceiver"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    draw_anew(model, ("q_proj", "k_proj"))
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    layers = [f"language_model.model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qk"]
    assert changed == {f"{layer}.weight" for layer in layers}
    drawn = torch.cat([after[name].flatten() for name in sorted(changed)])
    assert drawn.std().item() == pytest.approx(model.config.text_config.initializer_range, rel=0.05)
    with pytest.raises(UserError, match="reset: the language model has no w_proj"):
        draw_anew(model, ("w_proj",))


def test_a_stage_begins_with_the_reset_layers_new(scenes: Path, tmp_path: Path) -> None:
    rates = {"connector": 1e-9, "language_model": 1e-9}
    first = {
        "name": "align",
        "objective": "chat",
        "data": [{"path": "captions_chat.jsonl"}],
        "steps": 1,
        "learning_rates": rates,
    }
    stages = [first, {**first, "name": "chat", "reset": ["q_proj"]}]
    path = write_recipe(tmp_path / "r.yaml", {**chat_recipe(scenes), "stages": stages})
    run = run_training(load_recipe(path), tmp_path / "run")
    one, two = (dict(load(run.stage(name))[0].language_model.named_parameters()) for name in ("align", "chat"))
    moved = {name for name, value in one.items() if (value - two[name]).abs().max() > 1e-4}
    assert moved == {name for name in one if "q_proj" in name}


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_what_is_frozen_does_not_change_by_a_bit(scenes: Path, tmp_path: Path, fusion: str) -> None:
    rates = {"connector": 1e-2, "lora": 1e-2}
    learning = ["multi_modal_projector.", "language_model.model.layers."]
    if fusion == "deep":  # while the gates are shut, nothing reaches the connector
        rates |= {"cross_attention": 1e-2, "gates": 1e-2}
        learning.append("cross_attention.")
    settings = chat_recipe(scenes, fusion, "perceiver", learning_rates=rates, lora={"rank": 2}, steps=3)
    settings["stages"].insert(0, {**settings["stages"][0], "name": "first", "steps": 1, "lora": None})
    settings["stages"][0] |= {"learning_rates": {"connector": 1e-3}}
    run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / "run")
    before, _ = load(run.stage("first"))
    after, _ = load(run.model)
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert all(name.startswith(tuple(learning)) for name in changed)
    assert any("q_proj" in name for name in changed)
    assert any(name.startswith("multi_modal_projector.") for name in changed)
    assert not any("norm" in name for name in changed if name.startswith("language_model."))


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_adapters_alone_are_kept_as_a_peft_folder_that_loads(
    scenes: Path, tmp_path: Path, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = run_training(
        load_recipe(write_recipe(tmp_path / "b.yaml", chat_recipe(scenes, fusion, steps=1))), tmp_path / "b"
    )
    settings = chat_recipe(scenes, fusion, learning_rates={"lora": 1e-2}, lora={"rank": 2}, steps=2)
    settings["model"] = {"pretrained": "b/model"}
    run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / "run")
    monkeypatch.chdir("/")  # the base is found from anywhere
    whole, _ = load(run.model)
    put_together, _ = load(run.adapter)
    started, _ = load(base.model)
    one, other, start = whole.state_dict(), put_together.state_dict(), started.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], start[name]) for name in one)
