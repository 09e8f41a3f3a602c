"""The order in which rows are seen: a pure function of seed and position, so stopping and going on loses nothing."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.pictures import ImageRef, load_image
from data.records import Record
from data.sources import Source
from vlm.errors import UserError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Order:
    """Sample number n (over all epochs) -> (epoch, row). Rows are shuffled in runs of `group` that stay together."""

    rows: int
    seed: int
    shuffle: bool = True
    group: int = 1

    def epoch(self, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Row numbers of one epoch; rows that don't fill a last group come at the end."""
        if not self.shuffle:
            return np.arange(self.rows)
        groups = np.random.default_rng([self.seed, number]).permutation(self.rows // self.group)
        whole = (groups[:, None] * self.group + np.arange(self.group)).reshape(-1)
        return np.concatenate([whole, np.arange(len(whole), self.rows)])


class Rows(Dataset[tuple[Record, np.random.Generator]]):
    """All sources as one list of records, each with the generator of its (epoch, row)."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self.seed = list(sources), seed
        self.starts = [0, *accumulate(len(source) for source in sources)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, position: tuple[int, int]) -> tuple[Record, np.random.Generator]:
        epoch, row = position
        which = bisect_right(self.starts, row) - 1
        record = self.sources[which][row - self.starts[which]]
        return record, np.random.default_rng([self.seed, 1, epoch, row])


class Loader(Generic[Made]):
    """Batches from number `first` on, forever: `make` turns the (record, generator) pairs of a batch into one.

    Rank r of n takes the r-th of n equal parts of every batch. What batch k holds depends on the seed and k alone,
    whatever the number of workers; the whole state of a loader is therefore the number of the next batch.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order,
        batch_size: int,
        make: Callable[[list[tuple[Record, np.random.Generator]]], Made],
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert batch_size % world == 0
        self.rows, self.order, self.batch_size, self.make = rows, order, batch_size, make
        self.workers, self.rank, self.world = workers, rank, world

    def batches(self, first: int) -> Iterator[Made]:
        loader: DataLoader[Any] = DataLoader(
            self.rows,
            batch_sampler=_Positions(self, first),
            collate_fn=self._try_to_make,
            num_workers=self.workers,
            persistent_workers=False,
            prefetch_factor=4 if self.workers else None,
            generator=torch.Generator(),  # else making an iterator draws from the run's own random state
        )
        return map(_made, loader)

    def _try_to_make(self, pairs: list[tuple[Record, np.random.Generator]]) -> Made | UserError:
        # raised by whoever asks for the batch: an error that a worker raises comes with its traceback as text
        try:
            return self.make(pairs)
        except UserError as error:
            return error

    def positions(self, first: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, row) pairs of this rank's part of each batch, from batch number `first` on."""
        share = self.batch_size // self.world
        known: tuple[int, Any] = (-1, None)
        number = first
        while True:
            start = number * self.batch_size + self.rank * share
            batch = []
            for sample in range(start, start + share):
                epoch, offset = divmod(sample, self.order.rows)
                if known[0] != epoch:
                    known = (epoch, self.order.epoch(epoch))
                batch.append((epoch, int(known[1][offset])))
            yield batch
            number += 1


def _made(batch: Made | UserError) -> Made:
    if isinstance(batch, UserError):
        raise batch
    return batch


class _Positions:
    """A batch sampler that `DataLoader` may iterate over."""

    def __init__(self, loader: Loader[Any], first: int) -> None:
        self.loader, self.first = loader, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.loader.positions(self.first)


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
