"""Rows that nothing can be learned from: where each is and why, and how to tell of many in a line."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from vlm.errors import UserError


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
        reason = re.sub(r"(?<!\w)(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", "…", self.reason)
        reason = re.sub(r"(?<![\w.])[^\s:]*/[^:]*(?=: )", "…", reason, count=1)
        return re.sub(r"\d[\d,]*", "N", reason)


Row = TypeVar("Row", bound=Bad)


def kinds(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what is wrong with them, the most frequent first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.kind, []).append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def summarise(rows: Iterable[Bad], most: int = 3) -> str:
    """The most frequent reasons with their counts, each by its first row."""
    found = list(kinds(rows).values())
    told = [f"{len(alike)} x {alike[0].where}: {alike[0].reason}" for alike in found[:most]]
    return "; ".join(told) + (f"; and {len(found) - most} other reasons" if len(found) > most else "")
