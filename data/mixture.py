"""The order in which rows are seen: a pure function of seed and position, so stopping and going on loses nothing."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data.bad import Bad
from data.records import Record
from data.rows import Source
from data.streams import Stream
from vlm.errors import UserError

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Sample = tuple[int, int]  # epoch and slot
KEPT = 4  # orders of a source that are kept: an epoch of a weight up to 3 goes back and forth between so many
STREAM_EPOCH = 100_000  # samples of what is called an epoch of a stream that says nothing of its own


@dataclass(frozen=True)
class Order:
    """Epoch -> its slots in the order they are seen. Slots are shuffled in runs of `group` that stay together."""

    slots: int
    seed: int | tuple[int, ...]
    shuffle: bool = True
    group: int = 1

    def epoch(self, number: int) -> Numbers:
        """Slots of one epoch; those that don't fill a last group come at the end."""
        if not self.shuffle:
            return np.arange(self.slots)
        seed = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        groups = np.random.default_rng([*seed, number]).permutation(self.slots // self.group)
        whole = (groups[:, None] * self.group + np.arange(self.group)).reshape(-1)
        return np.concatenate([whole, np.arange(len(whole), self.slots)])


class Mixture:
    """Several sources as one data set. An epoch has a number of slots for each of them.

    counts: rows that each source gives per epoch, all by default. A source that gives another number than it has goes
    on in the next epoch where it stopped, and is shuffled anew when it's through: no row falls behind the others.
    """

    def __init__(
        self,
        sources: Sequence[Source | Stream],
        seed: int,
        counts: Sequence[int] | None = None,
        shuffle: bool = True,
        group: int = 1,
    ) -> None:
        self.sources, self.seed, self.shuffle = list(sources), seed, shuffle
        lengths = [STREAM_EPOCH if isinstance(source, Stream) else len(source) for source in sources]
        self.counts = list(counts or lengths)
        if group > 1 and (self.counts != lengths or self.streams):
            raise UserError("group: rows that stay neighbours need whole data sets; leave weight, rows and streams out")
        self.starts = [0, *accumulate(self.counts)]
        self.order = Order(self.starts[-1], seed, shuffle, group)
        self._epochs: dict[str, dict[int, Numbers]] = {}

    @property
    def streams(self) -> dict[int, Stream]:
        """The sources whose rows have no numbers: what fills a slot of theirs is whatever comes next."""
        return {which: source for which, source in enumerate(self.sources) if isinstance(source, Stream)}

    @property
    def rows(self) -> list[int]:
        """Of each source, -1 where nobody knows."""
        return [-1 if isinstance(source, Stream) else len(source) for source in self.sources]

    def reach(self, samples: int | None) -> int | None:
        """Different rows that so many samples meet at most, None for a stream. What is listed twice counts once."""
        met: dict[tuple[str, Path], int] = {}
        for source, count in zip(self.sources, self.counts, strict=True):
            if isinstance(source, Stream):
                return None
            same = source.where(0), source.images
            rows = len(source) if samples is None else -(-samples * count // len(self))
            met[same] = min(len(source), met.get(same, 0) + rows)
        return sum(met.values())

    def which(self, sample: Sample) -> int:
        """The source that a sample comes from."""
        return bisect_right(self.starts, sample[1]) - 1

    def __len__(self) -> int:
        """Slots of an epoch."""
        return self.starts[-1]

    def sample(self, number: int) -> Sample:
        """The epoch and the slot of a sample, counted over all epochs."""
        epoch, place = divmod(number, len(self))
        return epoch, int(self._epoch("mixture", self.order, epoch)[place])

    def place(self, sample: Sample) -> tuple[Source, int]:
        """The numbered row that fills a slot in an epoch."""
        epoch, slot = sample
        which = self.which(sample)
        source = self.sources[which]
        assert isinstance(source, Source)
        row, count, whole = slot - self.starts[which], self.counts[which], len(source)
        if count != whole:
            cycle, row = divmod(epoch * count + row, whole)
            order = Order(whole, (self.seed, 2, which), self.shuffle)
            row = int(self._epoch(f"source {which}", order, cycle)[row])
        return source, row

    def read(self, sample: Sample) -> Record | Bad:
        source, row = self.place(sample)
        try:
            return source[row]
        except UserError as error:
            return Bad.of(source.where(row), error)

    def generator(self, sample: Sample) -> np.random.Generator:
        """Of all that is drawn for a sample."""
        return np.random.default_rng([self.seed, 1, *sample])

    def _epoch(self, name: str, order: Order, number: int) -> Numbers:
        known = self._epochs.setdefault(name, {})
        if number not in known:
            known[number] = order.epoch(number)
            while len(known) > KEPT:
                known.pop(next(iter(known)))
        return known[number]

    def __getstate__(self) -> dict[str, Any]:
        """Orders are made again where they are needed."""
        return {**vars(self), "_epochs": {}}
