"""A rank's steps: every row once an epoch on any number of ranks and workers, the same again after any stop."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.bad import Bad
from data.collate import Sample
from data.encode import Example
from data.loader import ImageCache, Loader, State, Step
from data.mixture import Mixture
from data.packing import Packing
from data.records import Record
from data.sources import open_source
from vlm import UserError

ROWS = 53
UNREADABLE, UNDECODABLE = {4, 5, 30}, {7, 31, 52}
PACKINGS = [Packing(), Packing("bucket", window=16), Packing("pack", window=16)]
MODES = pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.mode)
Made = list[list[tuple[str, int]]]


class Words:
    """A row becomes as many tokens as its answer says, a micro-batch (place, draw) of every document in its rows."""

    def encode(self, record: Record, rng: np.random.Generator) -> Example:
        length = int(record.messages[-1]["content"][0]["text"])
        return Example([1] * length, [int(rng.integers(1 << 40))], (), Path(record.where).name)

    def load(self, examples: Sequence[Example]) -> list[Sample | Bad]:
        numbers = [int(example.where.partition(":")[2]) - 1 for example in examples]
        broken = UNDECODABLE if any(len(example.input_ids) == 33 for example in examples) else set()
        return [
            Bad(example.where, "no picture") if number in broken else Sample(example)
            for number, example in zip(numbers, examples, strict=True)
        ]

    def collate(self, rows: Sequence[Sequence[Sample]]) -> Made:
        return [[(sample.example.where, sample.example.labels[0]) for sample in row] for row in rows]


def write(path: Path, broken: bool) -> Path:
    lengths = np.random.default_rng(1).integers(1, 32, ROWS)
    rows = [{"question": "?", "answer": str(length)} for length in lengths]
    for number in UNREADABLE if broken else ():
        rows[number] = {"question": "?", "answer": ""}
    for number in UNDECODABLE if broken else ():
        rows[number]["answer"] = "33"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture([open_source(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", broken=False))], 3)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture([open_source(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", broken=True))], 3)


def steps(mixture: Mixture, count: int, state: State | None = None, **options: Any) -> list[Step[Made]]:
    batch_size = options.pop("batch_size", 6)
    loader = Loader(mixture, Words(), batch_size, **{"micro": 2, "tokens": 64, **options})
    return list(islice(loader.steps(state), count))


def documents(taken: Sequence[Step[Made]]) -> list[str]:
    return [where for step in taken for made in step.micro_batches for row in made for where, _ in row]


def named(taken: Sequence[Step[Made]]) -> list[str]:
    return [Path(bad.where).name for step in taken for bad in step.bad]


def everywhere(epochs: int = 1) -> Counter[str]:
    return Counter({f"rows.jsonl:{row + 1}": epochs for row in range(ROWS)})


@MODES
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranks_together_see_an_epoch_and_nothing_else(
    whole: Mixture, broken: Mixture, packing: Packing, world: int, workers: int
) -> None:
    for mixture in (whole, broken):
        taken: list[Step[Made]] = []
        for rank in range(world):
            options = {"rank": rank, "world": world, "workers": workers, "packing": packing, "samples": 2 * ROWS}
            own = steps(mixture, 40, **options)
            assert not own[-1].state.seen - own[-2].state.seen  # it's through
            taken += own
        assert Counter(documents(taken)) + Counter(named(taken)) == everywhere(epochs=2)
        assert set(named(taken)) == (
            {f"rows.jsonl:{row + 1}" for row in UNREADABLE | UNDECODABLE} if mixture is broken else set()
        )


@MODES
def test_without_an_end_epoch_follows_epoch(broken: Mixture, packing: Packing) -> None:
    taken = steps(broken, 60, packing=packing)
    seen = taken[-1].state.seen
    counts = Counter(documents(taken)) + Counter(named(taken))
    assert counts.total() == seen > ROWS
    assert max(counts.values()) - min(counts.values()) <= 1 + (packing.mode != "none")
    assert min(map(len, [made for step in taken for made in step.micro_batches])) == 2


@MODES
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (3, 2)])
def test_workers_change_nothing_and_going_on_after_any_step_gives_the_rest(
    broken: Mixture, packing: Packing, workers: int, world: int, rank: int
) -> None:
    options: dict[str, Any] = {"packing": packing, "world": world, "rank": rank, "samples": 2 * ROWS}
    whole = steps(broken, 30, **options)
    for stop in (0, 1, 2, 5, 11, 12):
        state = whole[stop].state
        assert steps(broken, 29 - stop, state, workers=workers, **options) == whole[stop + 1 :]


@given(
    stop=st.integers(0, 40),
    batch_size=st.sampled_from([1, 2, 7, 30]),
    window=st.integers(1, 70),
    mode=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_every_state_holds_all_that_matters(
    broken: Mixture, stop: int, batch_size: int, window: int, mode: int
) -> None:
    packing = Packing(PACKINGS[mode].mode, window=window)
    options: dict[str, Any] = {"packing": packing, "batch_size": batch_size, "micro": None}
    whole = steps(broken, 44, **options)
    assert steps(broken, 3, whole[stop].state, **options) == whole[stop + 1 : stop + 4]


def test_a_broken_row_makes_room_for_the_next(broken: Mixture) -> None:
    places = [broken.place(broken.sample(number)) for number in range(ROWS)]
    order = [source.where(row) for source, row in places]
    bad = {f"rows.jsonl:{row + 1}" for row in UNREADABLE | UNDECODABLE}
    good = [name for name in (Path(where).name for where in order) if name not in bad]
    taken = steps(broken, len(good) // 6)
    assert documents(taken) == good[: len(good) // 6 * 6]
    assert all(len(made) == 2 for step in taken for made in step.micro_batches)
    assert {row.reason for step in taken for row in step.bad} == {"message 2: an empty answer", "no picture"}


@MODES
def test_hundreds_of_broken_rows_are_told_of_before_a_step_is_full(tmp_path: Path, packing: Packing) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "?", "answer": "" if number % 400 < 399 else "9"} for number in range(1000)]
    path.write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {"packing": packing, "shuffle": False, "samples": 1000}
    mixture = Mixture([open_source(path)], 3, shuffle=options.pop("shuffle"))
    taken = steps(mixture, 8, **options)
    assert len(taken[0].bad) < 400 < len(taken[0].bad) + len(taken[1].bad)
    assert Counter(named(taken)) == Counter(f"rows.jsonl:{row + 1}" for row in range(1000) if row % 400 < 399)
    assert Counter(documents(taken)) == Counter(f"rows.jsonl:{row}" for row in range(400, 1001, 400))
    for stop in range(4):
        assert steps(mixture, 3, taken[stop].state, **options) == taken[stop + 1 : stop + 4]


@MODES
def test_where_nothing_is_whole_every_row_is_named(tmp_path: Path, packing: Packing) -> None:
    for rows, reason in (
        ({"question": "?", "answer": ""}, "message 2: an empty answer"),
        ({"question": "?", "answer": "33"}, "no picture"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join([json.dumps(rows)] * 53))
        preparation = Words()
        preparation.load = lambda examples: [Bad(example.where, "no picture") for example in examples]  # type: ignore[method-assign]
        loader = Loader(Mixture([open_source(path)], 3), preparation, 6, packing=packing, tokens=64)
        step = next(loader.steps())
        assert not documents([step])
        assert set(named([step])) == set(everywhere())
        assert {bad.reason for bad in step.bad} == {reason}


def test_packed_rows_hold_documents_of_one_epoch(whole: Mixture) -> None:
    taken = steps(whole, 20, packing=Packing("pack", window=40), batch_size=1)
    rows = [[where for where, _ in row] for step in taken for made in step.micro_batches for row in made]
    seen: list[str] = []
    while len(seen) < ROWS:
        seen += rows.pop(0)
    assert Counter(seen) == everywhere()


def test_packed_rows_keep_within_their_room_and_fill_it(whole: Mixture) -> None:
    rows = [row for step in steps(whole, 20, packing=PACKINGS[2]) for made in step.micro_batches for row in made]
    (numbered, _) = whole.place((0, 0))
    lengths = {f"rows.jsonl:{n + 1}": int(numbered.row(n)["answer"]) for n in range(ROWS)}
    filled = [sum(lengths[where] for where, _ in row) for row in rows]
    assert max(filled) <= 64
    assert sum(filled) / len(filled) > 0.8 * 64


def test_the_runs_own_random_state_is_not_drawn_from(whole: Mixture) -> None:
    before = torch.get_rng_state()
    steps(whole, 3, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


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
