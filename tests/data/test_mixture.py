"""Which rows an epoch has, and in which order."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.bad import Bad
from data.mixture import Mixture, Order
from data.records import Record
from data.sources import Source, open_source
from vlm import UserError

COUNTS = (7, 1, 5)
TOTAL = sum(COUNTS)
ALL = [f"{number}-{row}" for number, count in enumerate(COUNTS) for row in range(count)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Three files of 13 rows together."""
    folder = tmp_path_factory.mktemp("rows")
    for number, count in enumerate(COUNTS):
        lines = [json.dumps({"question": "?", "answer": f"{number}-{row}"}) for row in range(count)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return [open_source(folder / f"{number}.jsonl") for number in range(len(COUNTS))]


def answers(mixture: Mixture, count: int, first: int = 0) -> list[str]:
    read = [mixture.read(mixture.sample(number)) for number in range(first, first + count)]
    return [record.messages[-1]["content"][0]["text"] for record in read if isinstance(record, Record)]


def test_without_shuffling_rows_come_in_the_order_of_the_files(sources: list[Source]) -> None:
    mixture = Mixture(sources, 5, shuffle=False)
    assert answers(mixture, 28) == (ALL * 3)[:28]
    source, row = mixture.place((0, 8))
    assert Path(source.where(row)).name == "2.jsonl:1"
    assert len(mixture) == 13


def test_an_epoch_has_every_row_once_and_no_two_are_alike(sources: list[Source]) -> None:
    order = answers(Mixture(sources, 5), 4 * TOTAL)
    epochs = [tuple(order[n * TOTAL : (n + 1) * TOTAL]) for n in range(4)]
    assert all(sorted(epoch) == sorted(ALL) for epoch in epochs)
    assert len({*epochs, tuple(ALL)}) == 5


def test_seeds_differ_and_nothing_else_does(sources: list[Source]) -> None:
    order = answers(Mixture(sources, 5), 26)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert answers(pickle.loads(pickle.dumps(Mixture(sources, 5))), 26) == order
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(Mixture(sources, 6), 26) != order
    assert answers(Mixture(sources, 5), 9, first=17) == order[17:]


@given(weights=st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_source_gives_its_count_and_wears_its_rows_evenly(
    sources: list[Source], weights: list[int], seed: int
) -> None:
    mixture = Mixture(sources, seed, weights)
    seen = answers(mixture, 10 * len(mixture))
    assert len(mixture) == sum(weights)
    for epoch in range(10):
        part = Counter(answer[0] for answer in seen[epoch * len(mixture) : (epoch + 1) * len(mixture)])
        assert [part[str(number)] for number in range(3)] == weights
    each = Counter(seen)
    for number, count in enumerate(COUNTS):
        times = [each[f"{number}-{row}"] for row in range(count)]
        assert max(times) - min(times) <= 1
        assert sum(times) == 10 * weights[number]


def test_the_parts_of_a_source_differ_between_epochs(sources: list[Source]) -> None:
    mixture = Mixture(sources[:1], 1, [3])
    halves = [frozenset(answers(mixture, 3, first=3 * epoch)) for epoch in range(7)]
    assert halves[0] & halves[1] == frozenset()
    assert len(set(halves)) > 3


def test_rows_seen_twice_in_an_epoch_are_drawn_for_anew(sources: list[Source]) -> None:
    mixture = Mixture(sources[1:2], 1, [3])
    assert len({int(mixture.generator(mixture.sample(n)).integers(1 << 60)) for n in range(3)}) == 3


def test_each_rows_generator_depends_on_seed_epoch_and_slot_alone(sources: list[Source]) -> None:
    def draws(seed: int, shuffle: bool, epoch: int) -> set[tuple[str, int]]:
        mixture = Mixture(sources, seed, shuffle=shuffle)
        samples = [mixture.sample(epoch * TOTAL + n) for n in range(TOTAL)]
        return {(mixture.place(one), int(mixture.generator(one).integers(1 << 60))) for one in samples}

    assert draws(5, True, 0) == draws(5, False, 0)
    assert not draws(5, True, 0) & draws(5, True, 1)
    assert not draws(5, True, 0) & draws(4, True, 0)


@pytest.mark.parametrize("group", [2, 3])
def test_groups_stay_together_in_order(group: int) -> None:
    for epoch in range(4):
        order = Order(TOTAL, seed=5, group=group).epoch(epoch).tolist()
        whole = TOTAL // group * group
        groups = [tuple(order[n : n + group]) for n in range(0, whole, group)]
        assert sorted(groups) == [tuple(range(n, n + group)) for n in range(0, whole, group)]
        assert groups != sorted(groups)
        assert order[whole:] == list(range(whole, TOTAL))  # what fills no group comes at the end


def test_groups_of_parts_of_files_are_refused(sources: list[Source]) -> None:
    with pytest.raises(UserError, match="neighbours need whole data sets"):
        Mixture(sources, 5, [7, 1, 4], group=2)


def test_orders_are_uniform_enough() -> None:
    first = Counter(int(Order(5, seed=seed).epoch(0)[0]) for seed in range(500))
    assert len(first) == 5
    assert min(first.values()) > 60


def test_a_million_rows_are_shuffled_in_little_memory() -> None:
    order = Order(1_000_000, 1).epoch(3)
    assert order.nbytes <= 8_000_000
    assert len(np.unique(order)) == 1_000_000


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "?", "answer": "a"}\n{"question": "?", "answer": " "}\n')
    mixture = Mixture([open_source(path)], 0, shuffle=False)
    assert isinstance(mixture.read((0, 0)), Record)
    assert mixture.read((0, 1)) == Bad(f"{path}:2", "message 2: an empty answer")
