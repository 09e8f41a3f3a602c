"""A run's folder: what lies where, and which recipe it belongs to."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.recipe import Recipe
from vlm.errors import UserError
from vlm.settings import dump, parse, read_yaml


class Run:
    """recipe.yaml, metrics.jsonl, checkpoints/step-N/, stages/NAME/ (each finished stage's model), model/, adapter/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.metrics_file = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"
        self.adapter = folder / "adapter"
        self.tokenizer = folder / "tokenizer"

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name

    @property
    def finished(self) -> bool:
        return (self.model / "config.json").is_file()

    def held(self) -> Recipe | None:
        """The recipe whose run the folder holds."""
        if not self.recipe_file.is_file():
            return None
        return parse(Recipe, read_yaml(self.recipe_file), str(self.recipe_file))

    def claim(self, recipe: Recipe, resume: bool) -> bool:
        """Makes the folder this recipe's; True when it was empty. UserError if it holds another's run, or this one's
        and `resume` is off."""
        held = self.held()
        if held is not None:
            if held != recipe:
                raise UserError(
                    f"{self.folder}: holds the run of another recipe ({_difference(held, recipe)}); use another --out"
                )
            if not resume:
                state = "a finished run" if self.finished else "an unfinished run"
                raise UserError(
                    f"{self.folder}: holds {state} of this recipe; --resume goes on with it, or use another --out"
                )
            return False
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: not empty, and not a run; use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.recipe_file.with_suffix(".partial")
        partial.write_text(dump(recipe), encoding="utf-8")
        partial.rename(self.recipe_file)
        return True

    def abandon(self) -> None:
        """Removes the run if it hasn't done a step, so that it doesn't stand in the way of the next."""
        if self.metrics_file.is_file() and self.metrics_file.stat().st_size:
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.is_file():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text(encoding="utf-8").splitlines()]

    def forget_after(self, step: int) -> None:
        """Removes the lines of metrics.jsonl after `step`, also one that was cut off in the middle of writing."""
        if not self.metrics_file.is_file():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if entry["step"] <= step:
                kept.append(line + "\n")
        partial = self.metrics_file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.metrics_file)


def resolved(recipe: Recipe, held: Recipe | None, threads: int) -> Recipe:
    """The recipe as a run stores it: absolute data folder, and the thread count that its figures depend on, which is
    the stored one where the recipe names none."""
    threads = recipe.threads or (held.threads if held else None) or threads
    return replace(recipe, data_root=str(Path(recipe.data_root).resolve()), threads=threads)


def _difference(held: Recipe, new: Recipe) -> str:
    names = [name for name in vars(held) if getattr(held, name) != getattr(new, name)]
    return f"they differ in {', '.join(names)}"
