"""Checkpoints: everything that the rest of a stage depends on, written aside and renamed, read back bit for bit."""

import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.mixture import Mixture
from vlm.checkpoint import check_finite, written_aside
from vlm.errors import UserError

PACE = ("peak", "weight_decay")  # of an optimizer's group: the recipe's own, which may have changed since


@dataclass(frozen=True)
class Position:
    """stage: index in the recipe; done: its finished steps; step: finished steps of the whole run; loaders: where each
    rank's loader is; random: each rank's random state; rows, data: of each of the stage's sources their number and its
    fingerprint, which must not have changed."""

    stage: int
    done: int
    step: int
    loaders: list[dict[str, Any]]
    random: list[dict[str, torch.Tensor]]
    rows: list[int]
    data: list[str]


def save_state(folder: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """checkpoints/step-N with what learns, the optimizer and the position; older ones beyond `keep` go. UserError, and
    nothing is written, where a value isn't finite."""
    learning = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    kept = optimizer.state_dict()["state"].items()
    moments = ((f"the optimizer's {name} {number}", value) for number, state in kept for name, value in state.items())
    check_finite(chain(learning.items(), moments), folder / f"step-{position.step}")
    with written_aside(folder / f"step-{position.step}") as partial:
        save_file(learning, partial / "learning.safetensors")
        state = {"optimizer": optimizer.state_dict(), "position": vars(position)}
        with (partial / "state.pt").open("wb") as file:  # given a path, torch hides what the system said
            torch.save(state, file)
    for old in sorted(folder.glob("step-*"), key=_number)[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return max(folder.glob("step-*"), key=_number, default=None)


def read_position(checkpoint: Path) -> Position:
    try:
        return Position(**_read(checkpoint)["position"])
    except TypeError:
        raise UserError(f"{checkpoint}: was written by another version of vlm; go on with that one") from None


def check_position(checkpoint: Path, position: Position, world: int, mixture: Mixture, data: list[str]) -> None:
    """UserError where the rest of the run can't be what it would have been."""
    if len(position.loaders) != world:
        raise UserError(
            f"{checkpoint}: was written by {len(position.loaders)} processes, and this run has {world}; start as many, "
            "so that each goes on where it was"
        )
    for source, had, has in zip(mixture.sources, position.rows, mixture.rows, strict=True):
        if had != has:
            raise UserError(f"{checkpoint}: {source.path} had {had} rows and has {has} now; put the old data back")
    for source, then, now in zip(mixture.sources, position.data, data, strict=True):
        if then != now:
            raise UserError(f"{checkpoint}: {source.path} holds other rows than it did; put the old data back")


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts model and optimizer back as they were. The model must have the same learning parts."""
    saved = load_file(checkpoint / "learning.safetensors")
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if saved.keys() != learning.keys():
        raise UserError(f"{checkpoint}: was saved with other learning parts than this recipe has")
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(saved[name])
    groups = [{name: group[name] for name in PACE} for group in optimizer.param_groups]
    optimizer.load_state_dict(_read(checkpoint)["optimizer"])
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)


def random_state() -> dict[str, torch.Tensor]:
    """What this process draws from: dropout, on its own device."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _read(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
    return state


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
