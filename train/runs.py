"""A run's folder: what lies where, and which recipe it belongs to."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.bad import Bad
from train.changes import Change, changes
from train.recipe import Recipe, Stage
from train.state import latest, read_position
from vlm.errors import UserError, room_for
from vlm.settings import dump, parse, read_yaml
from vlm.templates import SUPPLIED, find_template


class Run:
    """recipe.yaml, changes.jsonl (settings that changed on the way), metrics.jsonl, quarantine.jsonl (rows left out),
    checkpoints/step-N/, stages/NAME/ (each finished stage's model), model/, adapter/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.changes_file = folder / "changes.jsonl"
        self.metrics_file = folder / "metrics.jsonl"
        self.quarantine_file = folder / "quarantine.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"
        self.adapter = folder / "adapter"
        self.tokenizer = folder / "tokenizer"

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name

    @property
    def finished(self) -> bool:
        """Whether its last stage has left a model, and that is the run's."""
        held = self.held()
        return held is not None and self._is_over(held.stages[-1].name) and (self.model / "config.json").is_file()

    def held(self) -> Recipe | None:
        """The recipe whose run the folder holds."""
        if not self.recipe_file.is_file():
            return None
        return parse(Recipe, read_yaml(self.recipe_file), str(self.recipe_file))

    def claim(self, recipe: Recipe, resume: bool) -> bool:
        """Makes the folder this recipe's; True when it was empty. UserError if it holds another's run, or this one's
        and `resume` is off, or if a run can't go on with what has changed."""
        held = self.held()
        if held is not None:
            changed = changes(held, recipe)
            if refused := [str(change) for change in changed if not change.allowed]:
                raise UserError(
                    f"{self.folder}: holds the run of another recipe ({'; '.join(refused[:5])}); use another --out, or "
                    f"go on with its own: vlm train {self.recipe_file} --out {self.folder} --resume"
                )
            if not resume:
                state = "a finished run" if self.finished else "an unfinished run"
                raise UserError(
                    f"{self.folder}: holds {state} of this recipe; --resume goes on with it, or use another --out"
                )
            if changed:
                self._change(held, recipe, changed)
            return False
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: not empty, and not a run; use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._store(recipe)
        return True

    def _change(self, held: Recipe, recipe: Recipe, changed: list[Change]) -> None:
        """Goes on with changed settings, and says so in changes.jsonl. A finished run whose last stage becomes longer
        is opened again: that stage's model so far moves to stages/NAME-until-STEP."""
        for index, (before, after) in enumerate(zip(held.stages, recipe.stages, strict=True)):
            if before != after:
                self._check_progress(after, index, is_last=after is recipe.stages[-1])
        last, steps = recipe.stages[-1].name, len(self.metrics())
        if held.stages[-1] != recipe.stages[-1] and self._is_over(last):
            kept = self.stage(f"{last}-until-{steps}")
            shutil.rmtree(kept, ignore_errors=True)  # of the same steps, from an extension that was given up
            self.stage(last).rename(kept)  # from here on the run isn't finished, whatever happens
        if not self._is_over(last):
            for folder in (self.model, self.adapter):
                shutil.rmtree(folder, ignore_errors=True)
        self._store(recipe)
        line = {"step": steps, "changed": {c.path: [c.held, c.new] for c in changed}}
        _append(self.changes_file, json.dumps(line) + "\n")

    def _check_progress(self, new: Stage, index: int, is_last: bool) -> None:
        """UserError for changes of a stage that is over, and for an end that lies before where the stage is."""
        where, over = f"stages.{new.name}", self._is_over(new.name)
        if over and not is_last:
            raise UserError(f"{where}: is over, and the stage after it began from its model; use another --out")
        checkpoint = latest(self.checkpoints)
        at = read_position(checkpoint) if checkpoint is not None else None
        if at is None or at.stage != index:
            if over:
                raise UserError(f"{self.folder}: is finished, and no checkpoint is left in it to go on from")
            return
        if new.steps is not None:
            end, done, what = new.steps, at.done, "steps"
        else:
            assert new.epochs is not None
            lengths = [data.count(rows) for data, rows in zip(new.data, at.rows, strict=True)]  # a stream names `rows`
            end, done = round(new.epochs * sum(lengths)), sum(loader["seen"] for loader in at.loaders)
            what = f"epochs are {end} rows, which"
        if end < done:
            raise UserError(f"{where}: {new.steps or f'{new.epochs:g}'} {what} are fewer than the {done} that are done")
        if over and end == done:
            raise UserError(f"{where}: is over, so it changes nothing; give it more steps or epochs, too")

    def _is_over(self, stage: str) -> bool:
        return (self.stage(stage) / "config.json").is_file()

    def _store(self, recipe: Recipe) -> None:
        replace_text(self.recipe_file, dump(recipe))

    def abandon(self) -> None:
        """Removes the run if it has done no step and named no broken row, so that it isn't in the way of the next."""
        if any(file.is_file() and file.stat().st_size for file in (self.metrics_file, self.quarantine_file)):
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def metrics(self) -> list[dict[str, Any]]:
        return _read_lines(self.metrics_file)

    def steps_of(self, stage: str) -> int:
        """How many steps of a stage are logged."""
        return sum(entry["stage"] == stage for entry in self.metrics())

    def log(self, entry: dict[str, Any]) -> None:
        _append(self.metrics_file, json.dumps(_finite(entry), allow_nan=False) + "\n")

    def quarantined(self, stage: str) -> list[Bad]:
        """The rows that a stage has left out so far."""
        entries = _read_lines(self.quarantine_file)
        return [Bad(entry["where"], entry["reason"]) for entry in entries if entry["stage"] == stage]

    def quarantine(self, rows: Iterable[Bad], stage: str, step: int) -> None:
        entries = [{"where": row.where, "reason": row.reason, "stage": stage, "step": step} for row in rows]
        _append(self.quarantine_file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))

    def forget_after(self, step: int) -> None:
        """Removes what was logged after `step`, also a line that was cut off in the middle of writing."""
        for path in (self.metrics_file, self.quarantine_file):
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if entry["step"] <= step:
                    kept.append(line + "\n")
            replace_text(path, "".join(kept))


def _append(path: Path, text: str) -> None:
    """Adds lines to a file. Where there is no room for them it is as it was, without half a line."""
    before = path.stat().st_size if path.is_file() else 0
    with room_for(path):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if path.is_file():
                os.truncate(path, before)
            raise


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def resolved(recipe: Recipe, held: Recipe | None, threads: int) -> Recipe:
    """The recipe as a run stores it: absolute data folder, the text of the chat template, and the thread count that its
    figures depend on, which is the stored one where the recipe names none."""
    threads = recipe.threads or (held.threads if held else None) or threads
    model = recipe.model
    if model.chat_template is not None and model.chat_template not in SUPPLIED:
        model = replace(model, chat_template=find_template(model.chat_template))
    return replace(recipe, model=model, data_root=str(Path(recipe.data_root).resolve()), threads=threads)


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew, or leaves it as it was."""
    partial = path.with_suffix(".partial")
    with room_for(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
