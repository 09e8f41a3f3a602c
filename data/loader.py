"""Steps of a training stage: which rows a rank takes, in which order, prepared by workers, packed, and resumable."""

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.bad import Bad
from data.collate import Sample
from data.encode import Example
from data.mixture import Mixture
from data.packing import Packing, plan
from data.pictures import ImageRef, load_image
from data.records import Record
from data.streams import StreamState
from vlm.errors import UserError

Made = TypeVar("Made")
Made_co = TypeVar("Made_co", covariant=True)
Task = TypeVar("Task")
_Task = tuple[tuple[int, int], Record | Bad | None]  # a sample's epoch and slot, and its row where that was streamed
CHUNK = 8  # rows that a worker prepares at a time
BROKEN_IN_A_ROW = 256  # a step or window with so many ends early, so that they are told of


class Preparation(Protocol[Made_co]):
    """How a stage's rows become batches."""

    def encode(self, record: Record, rng: np.random.Generator) -> Example:
        """The row as tokens; UserError when it can't be learned from."""

    def load(self, examples: Sequence[Example]) -> list[Sample | Bad]:
        """Each example with the pixels of its images."""

    def collate(self, rows: Sequence[Sequence[Sample]]) -> Made_co:
        """One micro-batch of rows, each of one or (packed) several examples; of no rows one that counts nothing."""


@dataclass(frozen=True)
class State:
    """Where a rank's loader is. next: its next sample, or the first of the window it is in; taken: rows of that window
    that were given out; seen: samples that were, broken ones included; broken: how many of them were; streams: where
    streams are at `next`."""

    next: int = 0
    taken: int = 0
    seen: int = 0
    broken: int = 0
    streams: tuple[StreamState, ...] = ()


def read_state(saved: dict[str, Any]) -> State:
    """A state from what `asdict` made of it."""
    return State(**{**saved, "streams": tuple(StreamState(**stream) for stream in saved["streams"])})


@dataclass(frozen=True)
class Step(Generic[Made]):
    """What a rank needs for one optimizer step. bad: broken rows met on the way; state: the loader's afterwards; where:
    file:line of its rows."""

    micro_batches: list[Made]
    bad: list[Bad]
    state: State
    where: list[str]


@dataclass(frozen=True)
class _Row:
    """A row on its way: examples, then samples. bad: broken rows met since the row before; state: after it."""

    examples: Sequence[Any]
    bad: list[Bad]
    state: State


class Loader(Generic[Made]):
    """The steps of one rank.

    Samples are numbered over all epochs; rank r of n takes those that leave the remainder r. What a rank's step holds
    depends on the seed and on what came before alone, whatever the number of workers, and a few numbers are its whole
    state. Broken rows are left out and named; the next ones take their place, unless hundreds follow each other.

    batch_size: rows per step over all ranks; micro: rows per forward; tokens: room of a packed row; samples: where the
    stage ends, counted over all ranks (None: never; a rank that is through then gives steps that count nothing).
    """

    def __init__(
        self,
        mixture: Mixture,
        preparation: Preparation[Made],
        batch_size: int,
        micro: int | None = None,
        packing: Packing | None = None,
        tokens: int = 0,
        samples: int | None = None,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert batch_size % world == 0
        self.mixture, self.preparation, self.packing = mixture, preparation, packing or Packing()
        self.share = batch_size // world
        self.micro = min(micro or self.share, self.share)
        self.tokens, self.samples, self.workers, self.rank, self.world = tokens, samples, workers, rank, world

    def steps(self, state: State | None = None) -> Iterator[Step[Made]]:
        """From a state on; with `samples` set, steps without rows follow the last."""
        state = state or State()
        rows = self._loaded(state) if self.packing.mode == "none" else self._planned(state)
        rows = self._without_empty(rows)
        while True:
            taken: list[_Row] = []
            for row in islice(rows, self.share):
                taken.append(row)
                if not row.examples:
                    break
            bad = [bad for row in taken for bad in row.bad]
            state = replace(taken[-1].state, broken=state.broken + len(bad)) if taken else state
            documents = [row.examples for row in taken if row.examples]
            yield Step(
                [
                    self.preparation.collate(documents[start : start + self.micro])
                    for start in range(0, self.share, self.micro)
                ],
                bad,
                state,
                [sample.example.where for samples in documents for sample in samples],
            )

    def rows_together(self, looked_at: int = 256) -> float | None:
        """How many rows share a packed row, by the first so many; None for streams, which are read but once."""
        if self.mixture.streams:
            return None
        tasks: list[_Task] = [(self.mixture.sample(n), None) for n in range(min(looked_at, len(self.mixture)))]
        examples = [made for made in self._encode(tasks) if isinstance(made, Example)]
        rows = plan(examples, self.packing, self.tokens, self.micro, np.random.default_rng(0))
        return len(examples) / len(rows) if rows else None

    def _loaded(self, state: State) -> Iterator[_Row]:
        """One row a sample, its pixels ready."""
        seen = state.seen
        for number, made, streams in self._made(self._encode_and_load, state):
            seen += 1
            after = State(number + 1, 0, seen, streams=streams)
            yield _Row([], [made], after) if isinstance(made, Bad) else _Row([made], [], after)

    def _planned(self, state: State) -> Iterator[_Row]:
        """Rows by plan; their pixels are loaded when it's known what goes together."""
        waiting: list[_Row] = []

        def tasks() -> Iterator[Sequence[Example]]:
            for row in self._windows(state):
                waiting.append(row)
                yield row.examples

        for made in ordered_map(self.preparation.load, tasks(), self.workers):
            row = waiting.pop(0)
            bad = [sample for sample in made if isinstance(sample, Bad)]
            yield _Row([sample for sample in made if isinstance(sample, Sample)], row.bad + bad, row.state)

    def _windows(self, state: State) -> Iterator[_Row]:
        made = self._made(self._encode, state)
        size = max(1, self.packing.window // self.micro) * self.micro
        held = next(made, None)
        while held is not None:
            start, seen, streams = state.next, state.seen, state.streams
            examples: list[Example] = []
            bad: list[Bad] = []
            while held is not None and len(examples) < size and not self._ends(start, held[0], bad):
                number, one, streams = held
                examples.append(one) if isinstance(one, Example) else bad.append(one)
                held = next(made, None)
            rng = np.random.default_rng([self.mixture.seed, 3, self.rank, start])
            rows = plan(examples, self.packing, self.tokens, self.micro, rng)
            seen += len(bad) if state.taken == 0 else 0
            for place, row in enumerate(rows[state.taken :], start=state.taken + 1):
                seen += len(row)
                yield _Row(row, bad if place == 1 else [], replace(state, taken=place, seen=seen))
            state = State(number + 1, 0, seen, streams=streams)
            if not rows:
                yield _Row([], bad, state)

    def _ends(self, start: int, number: int, bad: Sequence[Bad]) -> bool:
        """Whether a window ends before a sample: packed rows are of one epoch, and broken rows are told of soon."""
        later = self._sample(number) // len(self.mixture) != self._sample(start) // len(self.mixture)
        return (self.packing.mode == "pack" and later) or len(bad) >= BROKEN_IN_A_ROW

    def _without_empty(self, rows: Iterable[_Row]) -> Iterator[_Row]:
        """Rows that lost all their examples go; what was wrong with them is told with the next, or by one without
        examples where there are many, or no next."""
        bad: list[Bad] = []
        row = None
        for row in rows:
            bad += row.bad
            if row.examples or len(bad) >= BROKEN_IN_A_ROW:
                yield replace(row, bad=bad)
                bad = []
        if bad and row is not None:
            yield replace(row, bad=bad)

    def _sample(self, number: int) -> int:
        return number * self.world + self.rank

    def _made(
        self, make: Callable[[list[_Task]], list[Any]], state: State
    ) -> Iterator[tuple[int, Any, tuple[StreamState, ...]]]:
        """What workers make of this rank's samples from a state on, in order: number, example or sample, and where the
        streams are after it."""
        after: deque[tuple[StreamState, ...]] = deque()
        chunk = min(self.share, CHUNK) if self.workers else self.share
        number = state.next
        for part in ordered_map(make, self._tasks(state, chunk, after), self.workers):
            for made in part:
                yield number, made, after.popleft()
                number += 1

    def _tasks(self, state: State, size: int, after: deque[tuple[StreamState, ...]]) -> Iterator[list[_Task]]:
        """Samples in chunks, with the rows of those that come from streams."""
        streams = self.mixture.streams
        at = dict(zip(streams, state.streams or repeat(StreamState()), strict=False))
        options = (self.mixture.seed, self.mixture.shuffle, self.rank, self.world)
        readers = {which: stream.read(at[which], *options) for which, stream in streams.items()}
        tasks: list[_Task] = []
        for number in count(state.next):
            if self.samples is not None and self._sample(number) >= self.samples:
                break
            sample = self.mixture.sample(self._sample(number))
            which, item = self.mixture.which(sample), None
            if which in readers:
                item, at[which] = next(readers[which])
            after.append(tuple(at.values()))
            tasks.append((sample, item))
            if len(tasks) == size:
                yield tasks
                tasks = []
        if tasks:
            yield tasks

    def _encode(self, tasks: list[_Task]) -> list[Example | Bad]:
        made: list[Example | Bad] = []
        for sample, item in tasks:
            record = self.mixture.read(sample) if item is None else item
            if isinstance(record, Bad):
                made.append(record)
                continue
            try:
                made.append(self.preparation.encode(record, self.mixture.generator(sample)))
            except UserError as error:
                made.append(Bad.of(record.where, error))
        return made

    def _encode_and_load(self, tasks: list[_Task]) -> list[Sample | Bad]:
        made = self._encode(tasks)
        loaded = iter(self.preparation.load([one for one in made if isinstance(one, Example)]))
        return [one if isinstance(one, Bad) else next(loaded) for one in made]


def ordered_map(make: Callable[[Task], Made], tasks: Iterator[Task], workers: int) -> Iterator[Made]:
    """What `make` makes of each task, in order; worker processes are a few tasks ahead."""
    if not workers:
        return map(make, tasks)
    loader: DataLoader[Any] = DataLoader(
        _Calls(make),
        batch_size=None,
        sampler=_Once(tasks),
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_keep_shared,
        prefetch_factor=4,
        generator=torch.Generator(),  # else making an iterator draws from the run's own random state
    )
    return iter(loader)


class _Calls(Dataset[Any]):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, task: Any) -> Any:
        return self.make(task)


class _Once:
    """A sampler that `DataLoader` may iterate over."""

    def __init__(self, tasks: Iterator[Any]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return self.tasks


def _keep_shared(_: int) -> None:
    """The collector would write into every page that a worker shares with its parent, and so copy it."""
    gc.freeze()


def _same(made: Any) -> Any:
    return made


class ImageCache:
    """Reads images, keeping the decoded ones up to a number of bytes: small data sets are decoded once."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit, self.used = limit, 0
        self.images: OrderedDict[ImageRef, Image.Image] = OrderedDict()

    def __call__(self, path: ImageRef) -> Image.Image:
        if path in self.images:
            self.images.move_to_end(path)
            return self.images[path]
        image = load_image(path)
        self.images[path] = image
        self.used += image.width * image.height * 3
        while self.used > self.limit:
            _, oldest = self.images.popitem(last=False)
            self.used -= oldest.width * oldest.height * 3
        return image
