"""The model card says what the files of a run know, and nothing of another model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.vlm.llavas import VISION
from vlm import VisionLanguageConfig
from vlm.convert.card import model_card

RECIPE = """\
stages:
- name: align
  steps: 40
  batch_size: 8
  learning_rates: {connector: 0.001, language_model: 0.0}
  data: [{path: captions.jsonl}]
data_root: /home/somebody/data
"""


def card(model: Path, adapter: Path | None = None) -> str:
    return model_card(VisionLanguageConfig(dtype="bfloat16"), "mine", model, adapter, 1234567, "llava-hf")


def scores(folder: Path, model: Path, **changes: Any) -> None:
    folder.mkdir(parents=True)
    settings = {"model": str(model), "control": "none", **changes}
    content = {"task": "vqav2", "n": 20, "metrics": {"accuracy": 61.25}, "settings": settings}
    (folder / "scores.json").write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    (folder / "model").mkdir(parents=True)
    (folder / "adapter").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 40, "loss": 1.234}\n')
    return folder


def test_a_run_is_told(run: Path) -> None:
    scores(run / "eval", run / "model")
    scores(run.parent / "blind", run / "model", control="blind")
    scores(run.parent / "other", run.parent / "other-model")
    said = card(run / "model")
    assert "| align | 40 | 8 | connector (0.001) | captions.jsonl |" in said
    assert "Step 40, the last: loss 1.234." in said
    assert "steps: 40" in said
    assert "somebody" not in said
    assert "| eval | vqav2 | shown | 20 | accuracy 61.25 |" in said
    assert "| blind | vqav2 | withheld | 20 | accuracy 61.25 |" in said
    assert "| other |" not in said
    assert "| parameters | 1,234,567 |" in said
    assert "| numbers | bfloat16 |" in said
    assert said.startswith("---\nlibrary_name: transformers\n")


def test_what_a_run_went_on_from_is_told_without_its_place(run: Path) -> None:
    recipe = "model: {pretrained: /home/somebody/base, fusion: early, connector: {type: mlp}}\nseed: 3\n"
    stages = "stages: [{name: chat, steps: 2, data: [{path: /home/somebody/data/rows.jsonl, images: ../somebody/i}]}]\n"
    (run / "recipe.yaml").write_text(recipe + stages)
    said = card(run / "model")
    assert "somebody" not in said
    shown = yaml.safe_load(said.split("```yaml")[1].split("```")[0])
    assert shown["model"] == {"pretrained": "base"}
    assert shown["stages"][0]["data"] == [{"path": "rows.jsonl", "images": "i"}]
    assert shown["seed"] == 3
    assert "| chat | 2 | None |  | rows.jsonl |" in said
    kept = "model: {pretrained: null, fusion: deep, vision: {pretrained: org/clip}}\n"
    (run / "recipe.yaml").write_text(kept)
    shown = yaml.safe_load(card(run / "model").split("```yaml")[1].split("```")[0])
    assert shown == yaml.safe_load(kept)


def test_two_encoders_and_tiles_are_told(tmp_path: Path) -> None:
    said = card(tmp_path)
    assert "| images | whole |" in said
    assert "second vision encoder" not in said
    config = VisionLanguageConfig(
        vision_config=VISION,
        second_vision_config={**VISION, "hidden_size": 64},
        tiling={"mode": "tiles", "pinpoints": [[32, 64], [64, 32]]},
    )
    said = model_card(config, "mine", tmp_path, None, 1, "vlm")
    assert "| vision encoder | clip_vision_model, 2 layers of width 32 |" in said
    assert "| second vision encoder | clip_vision_model, 2 layers of width 64 |" in said
    assert "| images | tiles, sizes 64 x 32, 32 x 64 |" in said


def test_an_adapter_is_its_runs(run: Path, tmp_path: Path) -> None:
    said = card(tmp_path / "base", run / "adapter")
    assert "| align | 40 |" in said
    assert "an adapter merged in" in said


def test_what_lies_near_by_chance_is_not_told(run: Path) -> None:
    (run / "imported").mkdir()
    said = card(run / "imported")
    assert "align" not in said
    assert "Nothing is recorded here about how this model was trained." in said
