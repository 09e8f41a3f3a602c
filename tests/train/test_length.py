"""What a run says of its length before it begins."""

from pathlib import Path

import pytest

from tests.train.recipes import chat_recipe, write_recipe
from train.loop import describe_length
from train.recipe import Stage
from vlm.cli import main


def stage(**settings: object) -> Stage:
    given = {"data": ({"path": "x"},), "learning_rates": {"connector": 1.0}, **settings}
    return Stage("chat", "chat", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "together", "told"),
    [
        ({"steps": 500}, 1.0, "chat: 4,000 rows an epoch; 500 steps of 16 rows = 2 epochs"),
        ({"epochs": 0.5, "batch_size": 32}, 1.0, "chat: 4,000 rows an epoch; 0.5 epochs = about 63 steps of 32 rows"),
    ],
)
def test_rows_steps_and_epochs_are_told(settings: dict[str, object], together: float, told: str) -> None:
    assert describe_length(stage(**settings), 4000, 0, together) == told


def test_a_packed_stage_tells_its_packed_rows_too(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(scenes, steps=None, epochs=1.0, batch_size=2, packing={"mode": "pack", "tokens": 400})
    assert main(["train", str(write_recipe(tmp_path / "r.yaml", recipe)), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "rows an epoch" in line)
    assert line.startswith("chat: 40 rows an epoch, about ")
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert line.endswith(f"packed rows of up to 400 tokens; 1 epochs = about {steps} steps of 2 packed rows")
