"""Broken rows of a run: named once, counted by reason, and the run's end when there are too many."""

from collections.abc import Iterable

from data.bad import Bad, summarise
from train.recipe import Recipe
from train.runs import Run
from vlm.errors import UserError

LEAST_SEEN = 1000


class Quarantine:
    """The broken rows of one stage. Every rank keeps all of them, so that all stop together; one of them writes."""

    def __init__(self, run: Run, recipe: Recipe, stage: str, rows: int | None, quiet: bool = False) -> None:
        """rows: that the stage can meet; None where nobody knows: then the share is that of the rows seen, of 1000 at
        least."""
        self.run, self.stage, self.most, self.quiet = run, stage, recipe.max_bad, quiet
        self.rows, self.streamed = rows or 0, rows is None
        self.known = {row.where: row for row in run.quarantined(stage)}

    def __len__(self) -> int:
        return len(self.known)

    def add(self, rows: Iterable[Bad], step: int, seen: int) -> None:
        """Rows that are new go into quarantine.jsonl. UserError when more than the allowed share are broken, or all.

        seen: samples that were met so far, over all ranks and epochs.
        """
        if self.streamed:
            self.rows = max(self.rows, seen, LEAST_SEEN)
        new = {row.where: row for row in rows if row.where not in self.known}
        self.known.update(new)
        if new and not self.quiet:
            self.run.quarantine(new.values(), self.stage, step)
        if self.known and len(self.known) >= self.rows:
            raise UserError(
                f"{self.stage}: none of the data's rows can be used ({summarise(self.known.values())}); all of them: "
                f"{self.run.quarantine_file}"
            )
        if len(self.known) > self.most * self.rows:
            raise UserError(
                f"{self.stage}: {len(self.known)} of {self.rows} rows are broken, more than max_bad ({self.most:.3g}) "
                f"allows ({summarise(self.known.values())}); all of them: {self.run.quarantine_file}"
            )

    def summary(self) -> str | None:
        """One line about what was left out."""
        if not self.known:
            return None
        return (
            f"{self.stage}: rows left out: {len(self.known)} of {self.rows} ({summarise(self.known.values())}); all of "
            f"them: {self.run.quarantine_file}"
        )
