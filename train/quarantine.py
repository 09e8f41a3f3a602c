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
        """rows: different ones that the stage meets; None for streams: then the share is that of the rows seen, of 1000
        at least, and a stream that begins again is counted again."""
        self.run, self.stage, self.most, self.rows, self.quiet = run, stage, recipe.max_bad, rows, quiet
        self.known = {_identity(row): row for row in run.quarantined(stage)}

    def __len__(self) -> int:
        return len(self.known)

    def add(self, rows: Iterable[Bad], step: int, seen: int, broken: int) -> None:
        """Rows that are new go into quarantine.jsonl. UserError when more than the allowed share are broken, or all.

        seen: samples that were met so far, over all ranks and epochs; broken: those of them that were.
        """
        new = {_identity(row): row for row in rows}
        new = {identity: row for identity, row in new.items() if identity not in self.known}
        self.known.update(new)
        if new and not self.quiet:
            self.run.quarantine(new.values(), self.stage, step)
        bad, met = (broken, max(seen, LEAST_SEEN)) if self.rows is None else (len(self), self.rows)
        if bad >= met:
            raise UserError(f"{self.stage}: none of the {met} rows that it meets can be used ({self._summary()}")
        if bad > self.most * met:
            raise UserError(
                f"{self.stage}: {bad} of {met} rows are broken, more than max_bad ({self.most:.3g}) allows "
                f"({self._summary()}"
            )

    def summary(self) -> str | None:
        """One line about what was left out."""
        if not self.known:
            return None
        of = "" if self.rows is None else f" of {self.rows}"
        return f"{self.stage}: rows left out: {len(self)}{of} ({self._summary()}"

    def _summary(self) -> str:
        return f"{summarise(self.known.values())}); all of them: {self.run.quarantine_file}"


def _identity(row: Bad) -> tuple[str, str]:
    """The same row may be broken in another way where it's listed again with another folder of images."""
    return row.where, row.reason
