"""`Source`: rows by number, whatever holds them."""

import json
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.formats import read_row, row_format
from data.index import Arrays, fingerprint
from data.key_map import KeyMap, check_keys, renamed
from data.records import Record
from data.scanner import MOST_BYTES
from data.unpack import unpacked
from vlm.errors import UserError

LOOKED_AT = 20  # rows that tell the format
LOOKED_FOR_KEYS = 1000  # rows among which each key that `columns` names must be


class Source(ABC):
    """Rows of a file, a folder or a data set, each parsed when it's asked for.

    path: what it was opened by; images: the folder that image paths are relative to and confined to. `source[i]` is a
    Record, or a UserError that begins with `where(i)`. Pickling keeps how it was opened, so it's cheap: a worker
    process opens the file for itself.
    """

    def __init__(
        self, path: Path, images: Path | None = None, row_format: str | None = None, columns: KeyMap = ()
    ) -> None:
        """row_format: what rows must be; by default each row is read by its own keys. columns: keys of other names."""
        self.path, self.row_format, self.columns = path, row_format, columns
        self.images = images or image_folder(path)
        if not self.images.is_dir():
            raise UserError(f"{self.images}: no such image folder")

    def __reduce__(self) -> tuple[type["Source"], tuple[Any, ...]]:
        return type(self), (self.path, self.images, self.row_format, self.columns)

    # whether images are in the source itself, so that whoever writes its rows elsewhere has to copy them
    holds_images = False
    cut = ""  # why there is nothing to be read behind its last row, which is broken, though there may be rows

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """file:line of a row, or file[index]."""

    @abstractmethod
    def row(self, index: int) -> Any:
        """The parsed row, unchecked."""

    def files(self) -> list[Path]:
        """What it reads rows from; none for a data set of the hub."""
        return [self.path]

    def fingerprint(self) -> str:
        """Of what rows are read from (pictures that are files of their own not included): other data, another one."""
        return fingerprint(self.files())

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.read(index)

    def read(self, index: int, lenient: bool = False) -> Record:
        """lenient: pictures that aren't there are `MissingImage`, and no error."""
        return self.record(self.row(index), self.where(index), lenient)

    def record(self, row: Any, where: str, lenient: bool = False) -> Record:
        return read_row(row, where, self.images, self.row_format, self.columns, lenient)

    def named_row(self, index: int) -> Any:
        """The parsed row, unchecked, by the names that `columns` gives its keys."""
        row = self.row(index)
        return renamed(row, self.columns)[0] if self.columns and isinstance(row, dict) else row

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def format(self) -> str:
        """What the rows are: the formats of the first few of them, or "unknown"."""
        return self.row_format or "+".join(self._formats()) or "unknown"

    def check_format(self) -> None:
        """Refuses a source of which none of the first rows is what `row_format` says."""
        found = self._formats()
        if self.row_format is not None and self.row_format not in found and found:
            raise UserError(f"{self.path}: its rows are {' and '.join(found)}, not {self.row_format}")
        if self.columns:
            check_keys(self.columns, self._some_rows(), str(self.path))

    def _some_rows(self) -> Iterator[Any]:
        """The first rows, then some of all."""
        count = min(LOOKED_FOR_KEYS, len(self))
        first = range(min(LOOKED_AT, len(self)))
        for index in (*first, *(place * len(self) // count for place in range(count))):
            try:
                yield self.row(index)
            except UserError:
                continue

    def _formats(self) -> list[str]:
        found: dict[str, None] = {}
        for index in range(min(LOOKED_AT, len(self))):
            try:
                name = row_format(self.named_row(index), self.row_format)
            except UserError:
                continue
            if name is not None:
                found[name] = None
        return list(found)


class FileRows(Source):
    """Rows that lie one behind the other in a file: row i is the bytes from `starts[i]` to `starts[i + 1]`.

    held: the file that is read; of a packed one (.gz) what was unpacked of it.
    """

    def __init__(
        self, path: Path, images: Path | None = None, row_format: str | None = None, columns: KeyMap = ()
    ) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such data file")
        super().__init__(path, images, row_format, columns)
        self.held = unpacked(path) if path.suffix == ".gz" else path
        self._arrays = self._index()
        self._starts = self._arrays["starts"]
        if not len(self):
            raise UserError(f"{path}: no rows in it")
        self._file = Bytes(self.held)

    @abstractmethod
    def _index(self) -> Arrays:
        """`starts` (one more than there are rows), and whatever else a subclass needs."""

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    def _read(self, index: int) -> bytes:
        start, end = self._starts[index : index + 2].tolist()
        return self._file.read(start, end, lambda: self.where(index))


class Bytes:
    """A file of which stretches are read, at no file position: processes and threads may share it.

    Not a memory map: its pages would count as this process's memory, and a file cut short under it would end the
    process.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, end: int, where: Callable[[], str]) -> bytes:
        if end - start > MOST_BYTES:
            raise UserError(f"{where()}: a row of {(end - start) >> 20} MB, and {MOST_BYTES >> 20} MB are the most")
        try:
            found = os.pread(self._descriptor, end - start, start)
        except OSError as error:
            raise UserError(f"{where()}: cannot be read ({error.strerror})") from None
        if len(found) < end - start:
            raise UserError(f"{where()}: not there any more; was the file changed after it was opened?")
        return found


def parse(text: bytes, where: Callable[[], str]) -> Any:
    """A JSON value; UserError with `where` for anything else."""
    try:
        return json.loads(text.decode().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where()}: not valid JSON ({_why(error)})") from None


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, character {error.pos + 1} of it"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} of it is no UTF-8"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number too long"


def image_folder(path: Path) -> Path:
    """Where images are by default: the folder `images` beside a file where there is one, else the file's own folder."""
    if path.is_dir():
        return path
    beside = path.parent / "images"
    return beside if beside.is_dir() else path.parent


def keys_of(names: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ids as integers that are equal where the ids are: ids that are numbers are themselves, others are hashed."""
    return np.fromiter(map(key_of, names), np.int64, len(names))


def key_of(name: Any) -> int:
    text = str(name)
    if len(text) < 19 and text.isdecimal() and text.isascii() and (text[0] != "0" or len(text) == 1):
        return int(text)
    from hashlib import blake2b

    return -1 - (int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()) >> 1)


def find_name(root: Path, names: Sequence[str]) -> str:
    """The first of the names that is there below the image folder, else the first: whoever opens it will say so."""
    for name in names:
        try:
            if os.path.exists(f"{root}/{name}"):  # noqa: PTH110 (for every row)
                return name
        except ValueError:  # a NUL in it
            break
    return names[0]
