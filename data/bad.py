"""Rows that nothing can be learned from: where each is and why, and how to tell of many in a line."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from vlm.errors import UserError

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|(?<![\w.])[\w./\\-]*[/\\][\w./\\-]*|\d[\d,.]*")


@dataclass(frozen=True)
class Bad:
    """where: file:line."""

    where: str
    reason: str

    @classmethod
    def of(cls, where: str, error: UserError) -> "Bad":
        return cls(where, str(error).removeprefix(f"{where}: "))

    @property
    def kind(self) -> str:
        """The reason without names and numbers: what rows that are broken in the same way share."""
        return _PARTICULARS.sub("…", self.reason)


def summarise(rows: Iterable[Bad], most: int = 3) -> str:
    """The most frequent reasons with their counts, each with its first row."""
    rows = list(rows)
    counts = Counter(row.kind for row in rows)
    first: dict[str, Bad] = {}
    for row in rows:
        first.setdefault(row.kind, row)
    told = [f"{count} x {first[kind].where}: {first[kind].reason}" for kind, count in counts.most_common(most)]
    return "; ".join(told) + (f"; and {len(counts) - most} other reasons" if len(counts) > most else "")
