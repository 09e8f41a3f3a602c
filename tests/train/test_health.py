"""Runs that go wrong: the weights take no step that isn't finite, nothing broken is written, dead models are named."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.recipes import chat_recipe, write_recipe
from train.health import LEAST_TOLERATED, Health
from train.loop import run_training
from train.objectives import Chat
from train.recipe import load_recipe
from train.runs import Run
from train.state import Position, save_state
from vlm import UserError, load, save
from vlm.cli import main


@pytest.fixture
def broken_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Losses that aren't finite, by number of the call from 1 on."""
    real = Chat.loss

    def install(*calls: int, value: float = math.nan) -> None:
        count = 0

        def loss(self: Chat, model: Any, batch: Any) -> Any:
            nonlocal count
            count += 1
            found, shown = real(self, model, batch)
            return (found * value if count in calls else found), shown

        monkeypatch.setattr(Chat, "loss", loss)

    return install


def run(scenes: Path, folder: Path, *overrides: str, resume: bool = False, **stage: Any) -> Run:
    recipe = write_recipe(folder.with_suffix(".yaml"), chat_recipe(scenes, **stage))
    return run_training(load_recipe(recipe, list(overrides)), folder, resume)


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    scenes: Path, tmp_path: Path, broken_at: Callable[..., None], capsys: pytest.CaptureFixture[str], value: float
) -> None:
    broken_at(2, value=value)
    done = run(scenes, tmp_path / "run", "checkpoint_every=1", steps=4)
    entries = strict_lines(done.metrics_file)
    assert [entry.get("skipped", False) for entry in entries] == [False, True, False, False]
    assert entries[1]["loss"] is entries[1]["gradient_norm"] is None
    assert len(entries[1]["rows"]) == 4
    assert all("chat.jsonl:" in where for where in entries[1]["rows"])
    assert "steps skipped, as their loss or gradient was not finite: 1 of 4 (step 2)" in capsys.readouterr().err
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(done.model / "model.safetensors").values())
    assert main(["report", str(done.folder)]) == 0


def test_a_skipped_step_leaves_weights_and_optimizer_alone(
    scenes: Path, tmp_path: Path, broken_at: Callable[..., None]
) -> None:
    settings: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "shuffle": False}
    run(scenes, tmp_path / "one", "checkpoint_every=1", "keep_checkpoints=9", steps=3, **settings)
    broken_at(2)
    run(scenes, tmp_path / "two", "checkpoint_every=1", "keep_checkpoints=9", steps=3, **settings)

    def state(name: str, step: int) -> dict[str, Any]:
        return torch.load(tmp_path / name / "checkpoints" / f"step-{step}" / "state.pt", weights_only=True)

    before, after = state("two", 1)["optimizer"]["state"], state("two", 2)["optimizer"]["state"]
    assert all(torch.equal(before[n][name], after[n][name]) for n in before for name in before[n])
    apart = [load_file(tmp_path / "two" / "checkpoints" / f"step-{n}" / "learning.safetensors") for n in (1, 2, 3)]
    assert all(torch.equal(apart[0][name], apart[1][name]) for name in apart[0])
    assert any(not torch.equal(apart[1][name], apart[2][name]) for name in apart[0])


def test_three_in_a_row_end_the_run_before_harm_and_lower_rates_go_on(
    scenes: Path, tmp_path: Path, broken_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, steps=8))
    arguments = ["train", str(recipe), "checkpoint_every=2", "--out", str(tmp_path / "run")]
    broken_at(4, 5, 6)
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "loss or gradient of the last 3 steps were not finite" in error
    assert error.count("chat.jsonl:") == 4
    assert "--resume stages.chat.learning_rates.PART=RATE" in error
    strict_lines(tmp_path / "run" / "metrics.jsonl")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(bool(t.isfinite().all()) for t in load_file(checkpoint / "learning.safetensors").values())
    broken_at()
    assert main([*arguments, "--resume", "stages.chat.learning_rates.connector=1e-4"]) == 0
    entries = strict_lines(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    rates = [entry["lr"]["connector"] / entry["lr"]["language_model"] for entry in entries]
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05)


def test_many_skipped_steps_apart_end_the_run_too() -> None:
    health = Health("s", 5.0)
    for step in range(1, 2 * LEAST_TOLERATED + 2):
        skipped = {"skipped": True, "rows": ["a:1"]} if step % 2 == 0 else {}
        health.add({"step": step, "loss": 1.0, "gradient_norm": 1.0, **skipped})
    with pytest.raises(UserError, match="11 of 22 steps"):
        health.add({"step": 22, "skipped": True, "rows": ["a:1"]})


def test_a_run_that_goes_on_counts_the_skipped_steps_before() -> None:
    earlier = [{"step": n, "loss": None, "gradient_norm": None, "skipped": True} for n in (1, 2)]
    with pytest.raises(UserError, match="the last 3 steps"):
        Health("s", 5.0, earlier).add({"step": 3, "skipped": True, "rows": ["a:1"]})


def entries(losses: list[float], norm: float, first_norm: float) -> Iterator[dict[str, Any]]:
    norms = [first_norm, *[norm] * len(losses)]
    return ({"step": n, "loss": loss, "gradient_norm": norms[n - 1]} for n, loss in enumerate(losses, start=1))


GUESS = math.log(400)


@pytest.mark.parametrize(
    ("losses", "norm", "why"),
    [
        ([6.0, 16e6, GUESS, GUESS, GUESS, GUESS], 0.0, "its gradient is 0"),
        ([6.0, 3.0, *[16e6] * 20], 2.0, "far above that of a guess"),
        ([2.0, 1.5, *[GUESS + 0.01] * 30], 0.1, "no better than a guess"),
        ([6.0] * 5 + [8.0] * 20, 1.0, "far above that of a guess"),
        ([6.0, 1e6, 1e3, *[GUESS + 0.01] * 20], 1e-2, "no better than a guess"),
    ],
)
def test_a_dead_model_is_told_of(losses: list[float], norm: float, why: str) -> None:
    health = Health("s", GUESS, entries(losses, norm, 1.0))
    with pytest.raises(UserError, match=f"the model is dead.*{why}"):
        health.check_alive()


@pytest.mark.parametrize(
    ("losses", "norm"),
    [
        ([GUESS + 0.3], 5.0),  # one step, from random weights
        ([20.0, 18.0, 15.0, 12.0], 5.0),  # wide random weights, on their way down
        ([6.0, 5.0, 3.0, 0.0005, 0.0001, 0.0001], 1e-9),  # learned by heart
        ([1.0, 3.0, 0.5, 2.0], 1.0),  # small batches differ
        ([GUESS] * 40, 0.5),  # on a plateau, not dead
        ([GUESS] * 4, 0.0),  # shut gates let no gradient through, from the first step on: said, not dead
    ],
)
def test_a_model_that_learns_is_not(losses: list[float], norm: float) -> None:
    Health("s", GUESS, entries(losses, norm, norm)).check_alive()


@pytest.mark.parametrize("rate", ["1e3", "1e30"])
def test_rates_that_blow_a_model_up_end_with_exit_code_1_and_no_model(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: str
) -> None:
    """At 1e3 nothing ever overflows: the loss rises to millions, then the model guesses and its gradient is 0."""
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, steps=40, schedule="constant"))
    rates = [f"stages.chat.learning_rates.{part}={rate}" for part in ("connector", "language_model")]
    assert main(["train", str(recipe), *rates, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the model is dead" in error or "not finite" in error
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "stages").exists()
    strict_lines(tmp_path / "run" / "metrics.jsonl")


def test_a_dead_model_ends_the_run_and_is_not_kept(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Chat.loss

    def risen(self: Chat, model: Any, batch: Any) -> Any:
        found, shown = real(self, model, batch)
        return found + 1e6 * batch.supervised, shown  # finite, with a gradient as ever

    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, steps=6))
    arguments = ["train", str(recipe), "checkpoint_every=1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(Chat, "loss", lambda *call: real(*call) if len(calls) < 2 else risen(*call))
    calls: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *call: (calls.append(1), step(*call))[1])
    assert main(arguments) == 1
    assert "the model is dead" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "stages").exists()


def test_nothing_that_is_not_finite_is_written(tmp_path: Path, tiny_models: Callable[[str, str], Path]) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg"][0, 0] = math.inf
    with pytest.raises(UserError, match=r"step-1: not written, since the optimizer's exp_avg 0"):
        save_state(tmp_path, Position(0, 1, 1, [], [], [], []), model, optimizer, keep=2)
    whole, processor = load(tiny_models("early", "mlp"))
    next(whole.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(UserError, match=r"not written, since .* holds values that are not finite"):
        save(whole, processor, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
