"""Whether a run is well: steps without a finite gradient are skipped and counted, and a dead model is told of."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from vlm.errors import UserError

# A single step may overflow in bf16, or hold one bad row; more than these is a run that has gone wrong.
MOST_IN_A_ROW = 3
MOST_SHARE = 0.01
LEAST_TOLERATED = 10
SHOWN_ROWS = 10
# Of the steps that the end of a stage is judged by.
LAST = 10
NO_GRADIENT = 1e-7
LEARNED = 1e-3  # a loss below needs no gradient any more
MARGIN = 10.0  # nats above twice a guess: contrastive losses start above it, as their scale is 14
SMALL_CHANCE = 3.0  # below are contrastive stages of up to 20 pairs; language models have more than 20 words

Entry = dict[str, Any]


def is_finite(entry: Entry) -> bool:
    """Whether loss and gradient norm of a step are, so that the weights may take it."""
    return math.isfinite(entry["loss"]) and math.isfinite(entry["gradient_norm"])


class Health:
    """The steps of one stage: those that were skipped, and how its loss began and where it is."""

    def __init__(self, stage: str, chance: float, earlier: Iterable[Entry] = ()) -> None:
        """chance: the loss of a guess among all that could be predicted; earlier: steps that were logged before."""
        self.stage, self.chance = stage, chance
        self.highest = 0.0
        self.steps = self.in_a_row = 0
        self.skipped: list[int] = []
        self.first: list[Entry] = []
        self.last: deque[Entry] = deque(maxlen=LAST)
        for entry in earlier:
            self._count(entry)

    def add(self, entry: Entry) -> None:
        """One step more. UserError when too many were skipped."""
        self._count(entry)
        if not entry.get("skipped"):
            return
        if self.in_a_row < MOST_IN_A_ROW and len(self.skipped) <= max(LEAST_TOLERATED, MOST_SHARE * self.steps):
            return
        many = self.in_a_row >= MOST_IN_A_ROW
        which = f"the last {self.in_a_row} steps" if many else f"{len(self.skipped)} of {self.steps} steps"
        rows = entry["rows"]
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        raise UserError(
            f"{self.stage}: loss or gradient of {which} were not finite; the weights took none of them. The last is "
            f"step {entry['step']}, of the rows {', '.join(rows[:SHOWN_ROWS])}{more} (metrics.jsonl names all). Look "
            "at them, or go on from the last checkpoint with lower rates: --resume "
            f"stages.{self.stage}.learning_rates.PART=RATE"
        )

    def summary(self) -> str | None:
        """One line about what was skipped, or that nothing was learned from the first step on."""
        if not self.skipped:
            if self.first and self._stands_still([*self.first, *self.last]):
                return (
                    f"{self.stage}: the gradient was 0 in every step: nothing was learned; are gates shut and frozen?"
                )
            return None
        shown = ", ".join(map(str, self.skipped[:SHOWN_ROWS])) + ", ..." * (len(self.skipped) > SHOWN_ROWS)
        return (
            f"{self.stage}: steps skipped, as their loss or gradient was not finite: {len(self.skipped)} of "
            f"{self.steps} (step {shown})"
        )

    def check_alive(self) -> None:
        """UserError when what the stage has left is no model any more."""
        learned = self.steps - len(self.skipped)
        if not learned:
            raise UserError(f"{self.stage}: none of its {self.steps} steps had a finite gradient; nothing was learned")
        ends = list(self.last)[-max(1, learned // 2) :]
        first, last = self.first[0]["loss"], sum(entry["loss"] for entry in ends) / len(ends)
        if last > LEARNED and self._stands_still(ends) and not self._stands_still(self.first):
            why = "its gradient is 0, so nothing is learned"
        elif last > first and last > self._too_high(learned):
            why = f"it has risen far above that of a guess ({self.chance:.3g})"
        elif self._knew_something() and last > 0.99 * self.chance:
            why = f"that is no better than a guess ({self.chance:.3g})"
        else:
            return
        raise UserError(
            f"{self.stage}: the model is dead: its loss went from {first:.4g} to {last:.4g}, and {why}. It is not kept "
            "as a model; begin anew with lower learning rates"
        )

    def _too_high(self, learned: int) -> float:
        """A loss that only a model that has blown up has at its end. Contrastive losses (of small chance) and those of
        a few steps start well above a guess, or differ much from step to step."""
        few = learned < LAST or self.chance < SMALL_CHANCE
        return 2 * self.chance + MARGIN if few else self.chance + 1

    def _knew_something(self) -> bool:
        """Whether it began far better than a guess, or rose so high on the way that it can't be what it was."""
        if self.chance < SMALL_CHANCE:
            return self.highest > 2 * self.chance + MARGIN
        return min(entry["loss"] for entry in self.first) < 0.5 * self.chance or self.highest > 2 * self.chance + MARGIN

    def _stands_still(self, entries: Iterable[Entry]) -> bool:
        return max(entry["gradient_norm"] for entry in entries) < NO_GRADIENT

    def _count(self, entry: Entry) -> None:
        self.steps += 1
        if entry.get("skipped"):
            self.in_a_row += 1
            self.skipped.append(entry["step"])
            return
        self.in_a_row = 0
        self.highest = max(self.highest, entry["loss"])
        if len(self.first) < LAST:
            self.first.append(entry)
        self.last.append(entry)
