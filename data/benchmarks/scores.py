"""Scores of a run on a benchmark, and the comparison of two."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data.benchmarks.measures import SAMPLES, Measure


@dataclass(frozen=True)
class Scores:
    """measures: name -> metric; per_item: id -> number; notes: what else a reader must know, such as what was left out.

    scored: which answers these are and by which rule, where people may mean another one; other: by that one.
    Measures are over the items of `per_item`, in its order, over some of them (breakdowns), or over groups
    of them (MMBench's questions).
    """

    task: str
    mode: str
    measures: dict[str, Measure]
    per_item: dict[str, float]
    notes: dict[str, Any] = field(default_factory=dict)
    scored: str = ""
    other: "Scores | None" = None

    @property
    def n(self) -> int:
        return len(self.per_item)

    @cached_property
    def metrics(self) -> dict[str, float]:
        return {name: float(measure) for name, measure in self.measures.items()}

    def intervals(self, samples: int = SAMPLES, seed: int = 0) -> dict[str, tuple[float, float]]:
        return {name: measure.interval(samples, seed) for name, measure in self.measures.items()}

    def as_json(self, per_item: bool, samples: int = 0, seed: int = 0) -> dict[str, Any]:
        shown: dict[str, Any] = {"task": self.task, "mode": self.mode, "n": self.n, "metrics": self.metrics}
        if samples:
            shown["intervals"] = self.intervals(samples, seed)
        if self.scored:
            shown["scored"] = self.scored
        if self.other is not None:
            shown["other"] = {"scored": self.other.scored, "mode": self.other.mode, "metrics": self.other.metrics}
        return {**shown, **self.notes, **({"per_item": self.per_item} if per_item else {})}


@dataclass(frozen=True)
class Difference:
    """Of one metric: what each of two runs has, their difference, and its 95 % interval."""

    ours: float
    theirs: float
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        return self.ours - self.theirs


def differences(ours: Scores, theirs: Scores, samples: int = SAMPLES, seed: int = 0) -> dict[str, Difference]:
    """Paired: both runs keep the same items in each draw. Both are scores of the same items."""
    found = {}
    for name, measure in ours.measures.items():
        if name in theirs.measures:
            other = theirs.measures[name]
            found[name] = Difference(float(measure), float(other), measure.minus(other).interval(samples, seed))
    return found


def changed(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Items whose score differs: id -> ours, theirs; the largest gain first, the largest loss last."""
    pairs = {i: (ours[i], theirs[i]) for i in ours if ours[i] != theirs[i]}
    return dict(sorted(pairs.items(), key=lambda pair: pair[1][1] - pair[1][0]))
