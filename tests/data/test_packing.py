"""Plans: every example in one row, no row beyond its bounds, and little room left over."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encode import Example
from data.packing import Packing, pack, plan
from tests.data.mix665k import lengths_like_mix665k

DOCUMENTS = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 12)), max_size=40)


def slow_first_fit_decreasing(lengths: list[int], images: list[int], tokens: int, most: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if (
                sum(lengths[i] for i in row) + lengths[index] <= tokens
                and sum(images[i] for i in row) + images[index] <= most
            ):
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@given(documents=DOCUMENTS, tokens=st.integers(20, 150), most=st.integers(1, 10))
@settings(max_examples=200, deadline=None)
def test_packing_is_first_fit_decreasing_within_both_bounds(
    documents: list[tuple[int, int]], tokens: int, most: int
) -> None:
    lengths, images = [length for length, _ in documents], [count for _, count in documents]
    rows = pack(lengths, images, tokens, most)
    assert rows == slow_first_fit_decreasing(lengths, images, tokens, most)
    assert sorted(index for row in rows for index in row) == list(range(len(documents)))
    for row in rows:
        alone = len(row) == 1
        assert alone or sum(lengths[i] for i in row) <= tokens
        assert alone or sum(images[i] for i in row) <= most


def test_lengths_like_mix665ks_fill_their_rows() -> None:
    lengths, images = lengths_like_mix665k(4096, np.random.default_rng(0))
    filled = []
    for start in range(0, 4096, 1024):
        window = slice(start, start + 1024)
        rows = pack(lengths[window], images[window], 2048, 8)
        filled.append(sum(lengths[window]) / (2048 * len(rows)))
    assert min(filled) >= 0.97


def examples(lengths: list[int], pictured: list[bool]) -> list[Example]:
    from pathlib import Path

    return [
        Example([1] * length, [1] * length, (Path("a.png"),) if shown else (), str(number))
        for number, (length, shown) in enumerate(zip(lengths, pictured, strict=True))
    ]


@pytest.mark.parametrize("mode", ["none", "bucket", "pack"])
@given(documents=st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=30), together=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_a_plan_has_every_example_once(mode: str, documents: list[tuple[int, bool]], together: int) -> None:
    window = examples([length for length, _ in documents], [shown for _, shown in documents])
    rows = plan(window, Packing(mode), 64, together, np.random.default_rng(0))  # type: ignore[arg-type]
    assert Counter(id(example) for row in rows for example in row) == Counter(map(id, window))
    assert all(row for row in rows)
    if mode == "none":
        assert [row[0] for row in rows] == window


def test_buckets_hold_rows_of_like_length_and_kind_in_random_order() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 1000, 256).tolist()
    window = examples(lengths, (rng.random(256) < 0.5).tolist())
    rows = [row[0] for row in plan(window, Packing("bucket"), 0, 8, np.random.default_rng(0))]
    groups = [rows[start : start + 8] for start in range(0, 256, 8)]
    longest = [max(len(example.input_ids) for example in group) for group in groups]
    assert sum(len({bool(example.images) for example in group}) > 1 for group in groups) <= 1
    assert sum(longest) * 8 < 1.15 * sum(lengths)
    assert longest != sorted(longest)


def test_packed_rows_come_in_random_order() -> None:
    window = examples([60] * 5 + [30] * 40, [False] * 45)
    rows = plan(window, Packing("pack"), 64, 1, np.random.default_rng(0))
    assert [len(row) for row in rows] != sorted(len(row) for row in rows)
