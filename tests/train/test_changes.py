"""Runs that go on with changed settings: longer, faster or slower; and what can't change is refused by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.kills import killed_at
from tests.train.recipes import chat_recipe, write_recipe
from train.changes import changes
from train.loop import run_training
from train.recipe import load_recipe
from train.runs import Run
from vlm import UserError, load
from vlm.cli import main


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def start(scenes: Path, tmp_path: Path, **stage: Any) -> Path:
    return write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, **stage))


def go(recipe: Path, folder: Path, *overrides: str, resume: bool = False) -> Run:
    return run_training(load_recipe(recipe, list(overrides)), folder, resume)


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics()]


def test_a_finished_run_is_made_longer_as_if_it_had_always_been(scenes: Path, tmp_path: Path) -> None:
    """With a constant rate the whole is, bit for bit, what one run of all steps is."""
    recipe = start(scenes, tmp_path, steps=4, schedule="constant", warmup=0.0)
    whole = go(recipe, tmp_path / "whole", "stages.chat.steps=7")
    run = go(recipe, tmp_path / "run")
    before = weights(run)
    go(recipe, tmp_path / "run", "stages.chat.steps=7", resume=True)
    assert losses(run) == losses(whole)
    one, other = weights(whole), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = load_file(run.stage("chat-until-4") / "model.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert [json.loads(line) for line in run.changes_file.read_text().splitlines()] == [
        {"step": 4, "changed": {"stages.chat.steps": [4, 7]}}
    ]
    held = run.held()
    assert held is not None
    assert held.stages[0].steps == 7
    load(run.model)


def test_a_run_in_epochs_is_made_longer(scenes: Path, tmp_path: Path) -> None:
    recipe = start(scenes, tmp_path, steps=None, epochs=0.2, batch_size=4)
    run = go(recipe, tmp_path / "run")
    assert len(run.metrics()) == 2
    go(recipe, tmp_path / "run", "stages.chat.epochs=0.4", resume=True)
    assert len(run.metrics()) == 4
    go(recipe, tmp_path / "run", "stages.chat.epochs=null", "stages.chat.steps=5", resume=True)
    assert len(run.metrics()) == 5


def test_a_stopped_run_goes_on_with_other_rates_and_checkpoints(scenes: Path, tmp_path: Path) -> None:
    recipe = start(scenes, tmp_path, steps=6, schedule="constant", warmup=0.0)
    with killed_at(4):
        go(recipe, tmp_path / "run")
    faster = ("stages.chat.learning_rates.connector=8e-3", "checkpoint_every=2", "max_bad=0.5", "workers=1")
    run = go(recipe, tmp_path / "run", *faster, resume=True)
    assert [entry["lr"]["connector"] for entry in run.metrics()] == [2e-3] * 3 + [8e-3] * 3
    assert [entry["lr"]["language_model"] for entry in run.metrics()] == [2e-3] * 6
    changed = json.loads(run.changes_file.read_text())["changed"]
    assert changed == {
        "checkpoint_every": [3, 2],
        "max_bad": [0.005, 0.5],
        "stages.chat.learning_rates.connector": [2e-3, 8e-3],
        "workers": [0, 1],
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.chat.batch_size=8", "stages.chat.batch_size is 4 there and 8 here"),
        (
            "stages.chat.learning_rates.vision_tower=1e-4",
            "vision_tower is not set there and 0.0001 here",
        ),
        ("stages.chat.learning_rates.connector=0", "learning_rates.connector is 0.002 there and 0.0 here"),
        ("model.connector.depth=1", "model.connector.depth is 2 there and 1 here"),
        ("stages.chat.train_on=all", "stages.chat.train_on is assistant there and all here"),
        ("seed=3", "seed is 0 there and 3 here"),
        ("stages.chat.name=other", "stages is chat there and other here"),
    ],
)
def test_what_may_not_change_is_refused_by_name(scenes: Path, tmp_path: Path, override: str, told: str) -> None:
    recipe = start(scenes, tmp_path, steps=2)
    run = go(recipe, tmp_path / "run")
    text = run.recipe_file.read_text()
    with pytest.raises(UserError) as error:
        go(recipe, tmp_path / "run", override, resume=True)
    assert told in str(error.value)
    assert f"vlm train {run.recipe_file} --out {run.folder} --resume" in str(error.value)
    assert run.recipe_file.read_text() == text
    assert not run.changes_file.exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stages.chat.steps=2"], "stages.chat: 2 steps are fewer than the 4 that are done"),
        (
            ["stages.chat.steps=null", "stages.chat.epochs=0.1"],
            "stages.chat: 0.1 epochs are 4 rows, which are fewer than the 16 that are done",
        ),
        (["stages.chat.learning_rates.connector=1e-3"], "is over, so it changes nothing; give it more steps or epochs"),
        (["stages.align.steps=9"], "stages.align: is over, and the stage after it began from its model"),
    ],
)
def test_a_change_that_comes_too_late_is_refused(scenes: Path, tmp_path: Path, overrides: list[str], told: str) -> None:
    settings = chat_recipe(scenes, steps=4)
    settings["stages"].insert(0, {**settings["stages"][0], "name": "align", "steps": 1})
    recipe = write_recipe(tmp_path / "r.yaml", settings)
    run = go(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=told):
        go(recipe, tmp_path / "run", *overrides, resume=True)
    assert run.finished


@pytest.mark.parametrize("killed", ["rmtree", "rename"])
def test_a_killed_extension_is_gone_on_with(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    recipe = start(scenes, tmp_path, steps=2)
    run = go(recipe, tmp_path / "run")
    real = shutil.rmtree

    def die(path: Path, *rest: Any, **more: Any) -> None:
        if Path(path) == run.model:
            raise KeyboardInterrupt
        real(path, *rest, **more)

    with monkeypatch.context() as patch:
        if killed == "rmtree":
            patch.setattr("train.runs.shutil.rmtree", die)
        else:
            patch.setattr("train.runs.replace_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            go(recipe, tmp_path / "run", "stages.chat.steps=4", resume=True)
    assert not run.finished
    go(recipe, tmp_path / "run", "stages.chat.steps=4", resume=True)
    assert (len(run.metrics()), run.finished) == (4, True)


def test_an_extension_that_was_given_up_is_no_hindrance(scenes: Path, tmp_path: Path) -> None:
    recipe = start(scenes, tmp_path, steps=2)
    run = go(recipe, tmp_path / "run")
    with killed_at(1):
        go(recipe, tmp_path / "run", "stages.chat.steps=4", resume=True)
    go(recipe, tmp_path / "run", resume=True)
    assert (len(run.metrics()), run.finished) == (2, True)
    go(recipe, tmp_path / "run", "stages.chat.steps=4", resume=True)
    assert (len(run.metrics()), run.finished) == (4, True)


def test_without_resume_nothing_changes(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = start(scenes, tmp_path, steps=1)
    run = go(recipe, tmp_path / "run")
    longer = ["train", str(recipe), "stages.chat.steps=3", "--out", str(tmp_path / "run")]
    assert main(longer) == 1
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*longer, "--resume"]) == 0
    assert len(run.metrics()) == 3
    # and from the folder alone
    again = ["train", str(run.recipe_file), "--out", str(run.folder), "--resume", "stages.chat.steps=4"]
    assert main(again) == 0
    assert len(run.metrics()) == 4


def test_changes_are_named_as_overrides_name_them(scenes: Path, tmp_path: Path) -> None:
    recipe = start(scenes, tmp_path)
    held = load_recipe(recipe)
    new = load_recipe(recipe, ["stages.chat.augment.shift=2", "context=64", "stages.chat.data=[{path: lessons.jsonl}]"])
    assert [change.path for change in changes(held, new)] == [
        "context",
        "stages.chat.augment.shift",
        "stages.chat.data",
    ]
    assert not any(change.allowed for change in changes(held, new))
