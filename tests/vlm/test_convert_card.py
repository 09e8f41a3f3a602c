"""The model card says what the files of a run know, and nothing of another model."""

import json
from pathlib import Path
from typing import Any

import pytest

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


def test_an_adapter_is_its_runs(run: Path, tmp_path: Path) -> None:
    said = card(tmp_path / "base", run / "adapter")
    assert "| align | 40 |" in said
    assert "an adapter merged in" in said


def test_what_lies_near_by_chance_is_not_told(run: Path) -> None:
    (run / "imported").mkdir()
    said = card(run / "imported")
    assert "align" not in said
    assert "Nothing is recorded here about how this model was trained." in said
