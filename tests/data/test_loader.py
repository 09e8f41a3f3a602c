"""The order of rows: every row once an epoch on any number of ranks, the same again after any stop."""

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.loader import ImageCache, Loader, Order, Rows
from data.records import Record
from data.sources import Source
from vlm import UserError

Seen = list[tuple[str, str, int]]
COUNTS = (7, 1, 5)
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Three files of 13 rows together."""
    folder = tmp_path_factory.mktemp("rows")
    sources = []
    for number, count in enumerate(COUNTS):
        path = folder / f"{number}.jsonl"
        lines = [json.dumps({"question": "?", "answer": f"{number}-{row}"}) for row in range(count)]
        path.write_text("\n".join(lines) + "\n")
        sources.append(Source(path))
    return Rows(sources, seed=3)


ALL = [f"{number}-{row}" for number, count in enumerate(COUNTS) for row in range(count)]


def describe(items: list[tuple[Record, np.random.Generator]]) -> Seen:
    """Of every row its answer, its place, and a draw of its generator."""
    return [
        (record.messages[-1]["content"][0]["text"], Path(record.where).name, int(rng.integers(1 << 60)))
        for record, rng in items
    ]


def loader(rows: Rows, batch_size: int = 4, workers: int = 0, **options: Any) -> Loader[Seen]:
    ranks = {key: options.pop(key) for key in ("rank", "world") if key in options}
    order = Order(len(rows), **{"seed": 5, **options})
    return Loader(rows, order, batch_size, describe, workers=workers, **ranks)


def take(rows: Rows, count: int, first: int = 0, **options: Any) -> list[Seen]:
    return list(islice(loader(rows, **options).batches(first), count))


def answers(batches: list[Seen]) -> list[str]:
    return [answer for batch in batches for answer, _, _ in batch]


def test_without_shuffling_rows_come_in_the_order_of_the_files(rows: Rows) -> None:
    assert answers(take(rows, 7, shuffle=False)) == (ALL * 3)[:28]
    assert take(rows, 1, shuffle=False)[0][0][1] == "0.jsonl:1"
    assert (len(rows), rows[0, 8][0].messages[-1]["content"][0]["text"]) == (13, "2-0")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_of_an_epoch_together_see_every_row_once(rows: Rows, world: int) -> None:
    epochs = 6  # 13 rows in batches of 6 come out even after six epochs
    parts = [take(rows, 13 * epochs // 6, batch_size=6, rank=rank, world=world) for rank in range(world)]
    together = [answer for batch in zip(*parts, strict=True) for part in batch for answer, _, _ in part]
    assert together == answers(take(rows, 13 * epochs // 6, batch_size=6))
    for epoch in range(epochs):
        assert sorted(together[epoch * TOTAL : (epoch + 1) * TOTAL]) == sorted(ALL)
    assert all(len(batch) == 6 // world for part in parts for batch in part)


def test_epochs_differ_and_seeds_differ_and_nothing_else_does(rows: Rows) -> None:
    order = answers(take(rows, 13))
    epochs = [tuple(order[n * TOTAL : (n + 1) * TOTAL]) for n in range(4)]
    assert len({*epochs, tuple(ALL)}) == 5
    torch.manual_seed(1)
    np.random.seed(1)
    assert take(rows, 13) == take(rows, 13)
    assert answers(take(rows, 13, seed=6)) != order
    state = torch.get_rng_state()
    take(rows, 2)
    assert torch.equal(torch.get_rng_state(), state)  # and are not drawn from


@given(first=st.integers(0, 40), batch_size=st.sampled_from([1, 4, 6, 20]), group=st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_going_on_at_a_batch_gives_the_rest(rows: Rows, first: int, batch_size: int, group: int) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "group": group}
    assert take(rows, 5, first=first, **options) == take(rows, first + 5, **options)[first:]


@pytest.mark.parametrize("group", [2, 3])
def test_groups_stay_together_in_order(rows: Rows, group: int) -> None:
    for epoch in range(4):
        order = Order(TOTAL, seed=5, group=group).epoch(epoch).tolist()
        whole = TOTAL // group * group
        groups = [tuple(order[n : n + group]) for n in range(0, whole, group)]
        assert sorted(groups) == [tuple(range(n, n + group)) for n in range(0, whole, group)]
        assert groups != sorted(groups)
        assert order[whole:] == list(range(whole, TOTAL))  # what fills no group comes at the end


def test_orders_are_uniform_enough() -> None:
    first = Counter(int(Order(5, seed=seed).epoch(0)[0]) for seed in range(500))
    assert len(first) == 5
    assert min(first.values()) > 60


def test_workers_change_nothing(rows: Rows) -> None:
    assert take(rows, 9, first=2, workers=2) == take(rows, 9, first=2)


def test_rows_can_be_sent_to_a_process_that_shares_no_memory(rows: Rows) -> None:
    again = pickle.loads(pickle.dumps(rows))
    assert take(again, 5) == take(rows, 5)


def test_each_rows_generator_depends_on_seed_epoch_and_row_alone(rows: Rows) -> None:
    drawn = {(answer, draw) for batch in take(rows, 13) for answer, _, draw in batch}
    assert len(drawn) == 13 * 4  # other numbers for the same row in another epoch
    shuffled, ordered = (set(take(rows, 1, batch_size=13, shuffle=shuffle)[0]) for shuffle in (True, False))
    assert shuffled == ordered
    assert not shuffled & set(take(Rows(rows.sources, seed=4), 1, batch_size=13)[0])


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    for n, path in enumerate(paths):
        Image.new("RGB", (10, 10), (n, n, n)).save(path)
    return paths


def test_the_cache_keeps_the_latest_pictures_within_its_limit(pictures: list[Path]) -> None:
    cache = ImageCache(limit=3 * 300)
    for path in (*pictures[:3], pictures[0], pictures[3]):
        cache(path)
    assert list(cache.images) == [pictures[2], pictures[0], pictures[3]]  # the one not asked for longest has gone
    for path in pictures * 2:
        cache(path)
        assert cache.used == sum(image.width * image.height * 3 for image in cache.images.values()) <= 900


def test_the_cache_reads_a_file_once_and_gives_the_same_pixels(pictures: list[Path]) -> None:
    cache = ImageCache()
    before = [cache(path).getpixel((0, 0)) for path in pictures]
    for path in pictures:
        path.unlink()
    assert [cache(path).getpixel((0, 0)) for path in pictures] == before == [(n, n, n) for n in range(6)]


def test_a_picture_larger_than_the_cache_is_read_and_not_kept(pictures: list[Path]) -> None:
    cache = ImageCache(limit=299)
    assert cache(pictures[1]).getpixel((0, 0)) == (1, 1, 1)
    assert (len(cache.images), cache.used) == (0, 0)
    with pytest.raises(UserError, match="no such image"):
        cache(pictures[0].with_name("none.png"))
