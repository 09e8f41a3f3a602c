"""What of its recipe a run may go on with changed, and what was."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from train.recipe import Recipe
from vlm.settings import plain

# these decide nothing about what is learned
NO_MATTER = frozenset({"max_bad", "workers", "image_cache_mb", "checkpoint_every", "keep_checkpoints"})
# these decide how long and how fast: every checkpoint can be gone on from with others
PACE = frozenset({"steps", "epochs", "warmup", "schedule", "clip", "weight_decay"})


@dataclass(frozen=True)
class Change:
    """A setting by its path, as overrides name it, and its values in the run and in the recipe that goes on with it."""

    path: str
    held: Any
    new: Any

    @property
    def stage(self) -> str | None:
        """Whose setting it is."""
        parts = self.path.split(".")
        return parts[1] if parts[0] == "stages" and len(parts) > 2 else None

    @property
    def allowed(self) -> bool:
        """Whether a run may go on with it. A part that begins or ceases to learn needs another optimizer."""
        name = self.path.split(".", 2)[-1] if self.stage else self.path
        if name.startswith("learning_rates."):
            return _learns(self.held) == _learns(self.new)
        return name in (PACE if self.stage else NO_MATTER)

    def __str__(self) -> str:
        return f"{self.path} is {_shown(self.held)} there and {_shown(self.new)} here"


def changes(held: Recipe, new: Recipe) -> list[Change]:
    """The settings in which two recipes differ, in the order of their paths."""
    names = [[stage.name for stage in recipe.stages] for recipe in (held, new)]
    if names[0] != names[1]:
        return [Change("stages", *(", ".join(some) for some in names))]
    before, after = _flat(_by_name(held)), _flat(_by_name(new))
    paths = sorted(before.keys() | after.keys())
    pairs = [(path, before.get(path), after.get(path)) for path in paths]
    return [Change(path, one, other) for path, one, other in pairs if one != other]


def _by_name(recipe: Recipe) -> dict[str, Any]:
    """Stages by their names, as overrides find them."""
    settings: dict[str, Any] = plain(asdict(recipe))
    return {**settings, "stages": {stage["name"]: stage for stage in settings["stages"]}}


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{above}.{name}" if above else name
        if isinstance(value, Mapping) and value:
            found |= _flat(value, path)
        else:
            found[path] = value
    return found


def _learns(rate: Any) -> bool:
    return rate is not None and rate > 0


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)[:80]
