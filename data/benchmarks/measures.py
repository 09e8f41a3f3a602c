"""Metrics as functions of sums over items, so that items can be drawn again: intervals, and differences of two runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SAMPLES = 1000
LEVEL = 0.95


def _ratio(sums: Array) -> Array:
    result: Array = sums[..., 0] / sums[..., 1]
    return result


@dataclass(frozen=True)
class Measure:
    """statistics: [n, k], k numbers for each of n items; value: sums over items [..., k] -> the metric [...]."""

    statistics: Array
    value: Callable[[Array], Array] = _ratio

    def __float__(self) -> float:
        return float(self.value(self.statistics.sum(0)))

    def interval(self, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
        """The 95 % percentile bootstrap interval: items are drawn with replacement, `samples` times (Efron 1979)."""
        n, rng = len(self.statistics), np.random.default_rng(seed)
        rows, counts = distinct(self.statistics)
        if len(rows) <= samples:  # equal items are drawn together, which has the same distribution
            sums = rng.multinomial(n, counts / n, size=samples) @ rows
        else:
            draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(samples))
            sums = np.stack([draw @ self.statistics for draw in draws])
        return _interval(self.value(sums))

    def minus(self, other: "Measure") -> "Measure":
        """The difference of one metric of two runs over the same items, in the same order: drawn together."""
        k = self.statistics.shape[1]
        both = np.hstack([self.statistics, other.statistics])
        return Measure(both, lambda sums: self.value(sums[..., :k]) - other.value(sums[..., k:]))


@dataclass(frozen=True)
class AveragePrecision(Measure):
    """statistics: [n, 2], each item's score, and 1 for those that are looked for.

    The mean of the precision over the steps of recall, items of one score in one step, as scikit-learn has it.
    """

    scale: float = 1.0

    def __float__(self) -> float:
        return float(self.of_draws(np.ones((1, len(self.statistics))))[0])

    def interval(self, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
        return _interval(self.of_draws(self._draws(samples, seed)))

    def minus(self, other: Measure) -> Measure:
        assert isinstance(other, AveragePrecision)
        return _Gain(self.statistics, other=other, ours=self)

    def of_draws(self, weights: Array) -> Array:
        """weights: [m, n], how often each item is in each of m draws -> [m]"""
        order = np.argsort(-self.statistics[:, 0], kind="stable")
        scores, wanted = self.statistics[order].T
        ends = np.append(scores[1:] != scores[:-1], True)
        weights = weights[:, order]
        hits = np.cumsum(weights * wanted, axis=1)[:, ends]  # [m, steps]
        precision = share(hits, np.cumsum(weights, axis=1)[:, ends])
        steps = np.diff(hits, prepend=0, axis=1)
        return self.scale * share((precision * steps).sum(axis=1), hits[:, -1])

    def _draws(self, samples: int, seed: int) -> Array:
        n = len(self.statistics)
        return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples).astype(np.float64)


@dataclass(frozen=True)
class _Gain(AveragePrecision):
    """What one run's average precision is above another's, over the same items."""

    ours: AveragePrecision | None = None
    other: AveragePrecision | None = None

    def of_draws(self, weights: Array) -> Array:
        assert self.ours is not None
        assert self.other is not None
        return self.ours.of_draws(weights) - self.other.of_draws(weights)


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share(part: Array, whole: Array) -> Array:
    result: Array = part / np.where(whole > 0, whole, 1)
    return result


def distinct(rows: Array) -> tuple[Array, NDArray[np.int64]]:
    """Rows [n, k] without those that come again, sorted, and how often each comes: np.unique in a tenth of its time."""
    ordered = rows[np.lexsort(rows.T[::-1])]
    begins = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)))
    return ordered[begins], np.diff(begins, append=len(rows))


def mean(values: Any, scale: float = 1.0) -> Measure:
    """The mean of one number an item, times `scale`."""
    column = np.asarray(values, np.float64) * scale
    return Measure(np.column_stack([column, np.ones_like(column)]))
