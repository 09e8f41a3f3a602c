"""Data that is read in order because it's elsewhere: tars by address, and data sets that `datasets` streams.

A stream comes in blocks (a shard, or a thousand rows), each shuffled as a whole. Where a rank is in it is the block's
number, how much of it was taken, and what the library needs to read the block again: little enough for any checkpoint.
"""

import atexit
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from data.bad import Bad
from data.columns import image_columns, image_folder_of, named, open_columns, unfold_row
from data.formats import read_row
from data.index import fingerprint
from data.key_map import KeyMap
from data.pictures import ImageBytes, ImageSlice
from data.records import Record
from data.rows import Source
from data.shards import Shards
from vlm.errors import UserError, first_line

BLOCK = 1000  # rows of a streamed data set that are shuffled together
TRIES = 5  # of a download, each after twice as long a wait
Item = Record | Bad
_reading: "WeakSet[Generator[Any, None, None]]" = WeakSet()


@atexit.register
def _close() -> None:
    """What is still read is closed while the library is whole: torn down with it, it would print an error."""
    for tables in list(_reading):
        tables.close()


@dataclass(frozen=True)
class StreamState:
    """Where a rank is in a stream. at: what is needed to read the block again."""

    block: int = 0
    taken: int = 0
    at: dict[str, Any] = field(default_factory=dict)


class Stream(ABC):
    """Rows without numbers, endlessly: after the last comes the first again, in another order."""

    path: Path

    def read(
        self, state: StreamState, seed: int, shuffle: bool, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Item, StreamState]]:
        """This rank's rows from `state` on, each with the state after it. Ranks share no row and leave none out."""
        taken = state.taken
        for number, at, block in self.blocks(state, seed, shuffle, rank, world):
            rng = np.random.default_rng([seed, 5, rank, number])
            order = rng.permutation(len(block)) if shuffle else np.arange(len(block))
            for place in range(taken, len(block)):
                yield block[int(order[place])], StreamState(number, place + 1, at)
            taken = 0

    def head(self, count: int) -> list[Item]:
        """The first rows, each once."""
        items: list[Item] = []
        for item, _ in islice(self.read(StreamState(), 0, shuffle=False), count):
            if items and item.where == items[0].where:  # from the beginning again
                break
            items.append(item)
        return items

    @abstractmethod
    def fingerprint(self) -> str:
        """Of what it's read from, as far as that can be told without reading it: other data, another one."""

    @abstractmethod
    def blocks(
        self, state: StreamState, seed: int, shuffle: bool, rank: int, world: int
    ) -> Iterator[tuple[int, dict[str, Any], Sequence[Item]]]:
        """The blocks of a rank from that of `state` on: number, what reads it again, items."""


class ShardStream(Stream):
    """Tars (WebDataset) by http(s) address, fetched one ahead and removed when they were read.

    Each cycle has its own order of shards. Where there are fewer shards than ranks, ranks share each shard's rows.
    """

    def __init__(
        self, path: Path, addresses: Sequence[str], row_format: str | None = None, columns: KeyMap = ()
    ) -> None:
        self.path, self.addresses, self.row_format, self.columns = path, list(addresses), row_format, columns

    def fingerprint(self) -> str:
        return fingerprint([], *self.addresses)

    def blocks(
        self, state: StreamState, seed: int, shuffle: bool, rank: int, world: int
    ) -> Iterator[tuple[int, dict[str, Any], Sequence[Item]]]:
        shared = len(self.addresses) < world
        every = self.addresses if shared else self.addresses[rank::world]
        with tempfile.TemporaryDirectory(prefix="vlm-shards-") as folder, ThreadPoolExecutor(1) as pool:

            def address(number: int) -> str:
                cycle, place = divmod(number, len(every))
                order = np.random.default_rng([seed, 6, cycle]).permutation(len(every))
                return every[int(order[place]) if shuffle else place]

            def ask(number: int) -> Future[Path]:
                return pool.submit(fetch_file, address(number), Path(folder) / f"{number}.tar")

            number = state.block
            waiting = ask(number)
            while True:
                file, waiting = waiting.result(), ask(number + 1)
                shard = Shards(file, [file], row_format=self.row_format, keep=False, columns=self.columns)
                rows = range(rank, len(shard), world) if shared else range(len(shard))
                yield number, {}, _Block(shard, rows, str(file), address(number))
                file.unlink()
                number += 1


@dataclass(frozen=True)
class _Block(Sequence[Any]):
    """Rows of a shard, with their pictures, which outlive it; `name` is what it's called in errors."""

    shard: Shards
    rows: Sequence[int]
    file: str
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        row = self.rows[place]
        try:
            record = self.shard[row]
        except UserError as error:
            return Bad.of(self._named(self.shard.where(row)), UserError(self._named(str(error))))
        images = [
            ImageBytes(image.read(), f"{self.name}/{image.name}") if isinstance(image, ImageSlice) else image
            for image in record.images
        ]
        return replace(record, where=self._named(record.where), images=tuple(images))

    def _named(self, text: str) -> str:
        return text.replace(self.file, self.name)


class ColumnStream(Stream):
    """A data set that `datasets` streams: of the hub, or Parquet files; nothing of it is kept."""

    def __init__(
        self,
        path: Path,
        files: Sequence[Path] = (),
        images: Path | None = None,
        row_format: str | None = None,
        split: str = "",
        columns: KeyMap = (),
    ) -> None:
        self.path, self.files, self.row_format, self.split = path, list(files), row_format, split
        self.columns = columns
        self.images = images or image_folder_of(path, self.files)

    def fingerprint(self) -> str:
        return fingerprint(self.files) if self.files else fingerprint([], str(self.path), self.split)

    def blocks(
        self, state: StreamState, seed: int, shuffle: bool, rank: int, world: int
    ) -> Iterator[tuple[int, dict[str, Any], Sequence[Item]]]:
        from datasets.distributed import split_dataset_by_node

        number, row, read = state.block, int(state.at.get("row", 0)), state.at.get("read")
        part = f" of part {rank + 1} of {world}" if world > 1 else ""
        name = named(self.path, self.split)
        while True:
            data = open_columns(self.path, self.files, self.split, streaming=True)
            data = split_dataset_by_node(data, rank, world) if world > 1 else data
            if read is not None:
                data.load_state_dict(read)
            tables, before = data.iter(BLOCK), number
            _reading.add(tables)
            while True:
                at = {"row": row, "read": data.state_dict()}
                block = self._take(tables, name, row, part)
                if not block:
                    break
                yield number, at, block
                number, row = number + 1, row + len(block)
            if number == before and read is None:
                raise UserError(f"{self.path}: no rows in it")
            row, read = 0, None

    def _take(self, tables: Iterator[Any], name: str, first: int, part: str) -> list[Item]:
        """The next block, [] behind the last. It's one table, as tables of a row each take longer."""
        try:
            table = next(tables, None)
            if table is None:
                return []
            rows, folded = table.to_pylist(), image_columns(table.schema)
        except Exception as error:  # the library fails in its own, many ways, and so do networks
            raise UserError(f"{name}: cannot be read on from row {first} ({first_line(error)})") from error
        return [self._item(row, folded, f"{name}[{first + place}{part}]") for place, row in enumerate(rows)]

    def _item(self, row: dict[str, Any], folded: frozenset[str], where: str) -> Item:
        try:
            return read_row(unfold_row(row, folded, where), where, self.images, self.row_format, self.columns)
        except UserError as error:
            return Bad.of(where, error)


def fetch_file(address: str, file: Path) -> Path:
    """Downloads an address; UserError when it can't be had, after some tries."""
    import httpx

    error: BaseException = UserError("no reason")
    for wait in chain((2.0**n for n in range(TRIES - 1)), repeat(0.0, 1)):
        try:
            with httpx.stream("GET", address, timeout=60, follow_redirects=True) as answer, file.open("wb") as target:
                answer.raise_for_status()
                for piece in answer.iter_bytes(1 << 20):
                    target.write(piece)
            return file
        except httpx.HTTPStatusError as status:
            error = status
            if status.response.status_code < 500:
                break
        except httpx.HTTPError as broken:
            error = broken
        time.sleep(wait)
    raise UserError(f"{address}: cannot be fetched ({first_line(error)})")


def spread(source: Source | Stream, count: int) -> Iterator[Item]:
    """So many rows, or all where there are fewer, evenly over a source; the first of a stream."""
    if isinstance(source, Stream):
        yield from source.head(count)
        return
    count = min(count, len(source))
    for index in (place * len(source) // count for place in range(count)):
        try:
            yield source[index]
        except UserError as error:
            yield Bad.of(source.where(index), error)
