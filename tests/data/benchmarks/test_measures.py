"""Intervals: the bootstrap against the normal approximation and against itself, paired and unpaired."""

import numpy as np
import pytest

from data.benchmarks.measures import Array, Measure, distinct, mean
from data.benchmarks.scores import Scores, changed, differences

SEEDED = np.random.default_rng(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def normal(values: Array) -> tuple[float, float]:
    half = 1.96 * values.std() / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


@pytest.mark.parametrize(
    "values",
    [
        (SEEDED.random(2000) < 0.3).astype(float),  # two distinct rows: drawn by their counts
        SEEDED.gamma(2.0, size=1500),  # as many rows as items: drawn one by one
        SEEDED.choice([0, 0.3, 0.6, 0.9, 1.0], size=3000),
    ],
    ids=["yes or no", "any number", "five values"],
)
def test_the_interval_of_a_mean_is_nearly_the_normal_one(values: Array) -> None:
    low, high = mean(values, 100).interval(4000)
    wide = high - low
    assert (low, high) == pytest.approx([100 * bound for bound in normal(values)], abs=0.05 * wide)
    assert float(mean(values, 100)) == pytest.approx(100 * values.mean())


def test_both_ways_of_drawing_give_the_same_interval(rng: np.random.Generator) -> None:
    values = rng.choice([0.0, 1.0, 3.0], size=900, p=[0.5, 0.3, 0.2])
    by_counts = mean(values).interval(3000)
    one_by_one = mean(values + 1e-9 * np.arange(900)).interval(800), mean(values).interval(800)
    wide = by_counts[1] - by_counts[0]
    for other in one_by_one:
        assert other == pytest.approx(by_counts, abs=0.1 * wide)


@pytest.mark.parametrize("distinct", [True, False])
def test_draws_are_of_items_as_often_as_they_are_there(rng: np.random.Generator, distinct: bool) -> None:
    """Of the bootstrap's means the variance is known: that of the items over n."""
    values = rng.random(400) if distinct else rng.integers(0, 3, 400).astype(float)
    sums = []
    probe = Measure(mean(values).statistics, lambda s: sums.append(s) or s[..., 0] / s[..., 1])  # type: ignore[func-returns-value]
    probe.interval(300)
    (drawn,) = sums
    assert drawn.shape == (300, 2)
    assert set(drawn[:, 1]) == {400}
    assert (drawn[:, 0] / 400).std() == pytest.approx(values.std() / 20, rel=0.2)


def test_intervals_follow_the_seed_alone(rng: np.random.Generator) -> None:
    for values in (rng.random(1200), rng.integers(0, 2, 1200)):
        assert mean(values).interval(100, 1) == mean(values).interval(100, 1)
        assert mean(values).interval(100, 1) != mean(values).interval(100, 2)


def test_where_nothing_differs_there_is_no_width() -> None:
    assert mean([1.0] * 50).interval(100) == (1, 1)
    assert mean([0.25]).interval(100) == (0.25, 0.25)


def runs(rng: np.random.Generator, count: int = 1500) -> tuple[Scores, Scores]:
    """Two runs that answer most questions alike."""
    first = (rng.random(count) < 0.6).astype(float)
    second = np.where(rng.random(count) < 0.05, 1 - first, first)
    named = [{str(n): float(value) for n, value in enumerate(values)} for values in (first, second)]
    one, other = (
        Scores("exact", "official", {"accuracy": mean(v)}, n) for v, n in zip((first, second), named, strict=True)
    )
    return one, other


def test_paired_runs_have_a_narrower_interval_than_unpaired_ones(rng: np.random.Generator) -> None:
    ours, theirs = runs(rng)
    told = differences(ours, theirs, 2000)["accuracy"]
    assert told.value == pytest.approx(ours.metrics["accuracy"] - theirs.metrics["accuracy"])
    assert (told.ours, told.theirs) == (ours.metrics["accuracy"], theirs.metrics["accuracy"])
    apart = np.array(list(ours.per_item.values())) - np.array(list(theirs.per_item.values()))
    low, high = told.interval
    assert (low, high) == pytest.approx(normal(apart), abs=0.06 * (high - low))
    (our_low, our_high), (their_low, their_high) = (run.intervals(2000)["accuracy"] for run in (ours, theirs))
    unpaired = np.hypot(our_high - our_low, their_high - their_low)
    assert high - low < 0.5 * unpaired


def test_a_run_doesnt_differ_from_itself(rng: np.random.Generator) -> None:
    ours, _ = runs(rng)
    assert differences(ours, ours, 100)["accuracy"].interval == (0, 0)
    assert changed(ours.per_item, ours.per_item) == {}


def test_differences_are_of_the_metrics_that_both_have(rng: np.random.Generator) -> None:
    ours, theirs = runs(rng, 10)
    more = Scores("exact", "official", {**ours.measures, "meteor": ours.measures["accuracy"]}, ours.per_item)
    assert set(differences(more, theirs, 10)) == {"accuracy"}


def test_changed_items_come_from_gain_to_loss() -> None:
    ours = {"a": 0.0, "b": 1.0, "c": 0.5, "d": 0.3, "e": 1.0}
    theirs = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.0, "e": 1.0}
    assert list(changed(ours, theirs).items()) == [("b", (1.0, 0.0)), ("d", (0.3, 0.0)), ("a", (0.0, 1.0))]


def test_ratios_are_drawn_as_ratios(rng: np.random.Generator) -> None:
    """F1, say, is of drawn sums, not the mean of something."""
    table = np.zeros((600, 2))
    table[:, 0], table[:, 1] = rng.random(600) < 0.5, 1 + (rng.random(600) < 0.5)
    low, high = Measure(table).interval(1000)
    value = table[:, 0].sum() / table[:, 1].sum()
    assert float(Measure(table)) == pytest.approx(value)
    spread = (table[:, 0] - value * table[:, 1]).std() / np.sqrt(600) / table[:, 1].mean()  # the delta method
    assert (low, high) == pytest.approx((value - 1.96 * spread, value + 1.96 * spread), abs=0.1 * (high - low))


@pytest.mark.parametrize("columns", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 400])
def test_distinct_rows_are_those_of_numpy(rng: np.random.Generator, count: int, columns: int) -> None:
    rows = rng.integers(-2, 2, size=(count, columns)) / 3
    found, counts = distinct(rows)
    expected, theirs = np.unique(rows, axis=0, return_counts=True)
    assert np.array_equal(found, expected)
    assert np.array_equal(counts, theirs)
