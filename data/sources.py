"""Files of rows: JSONL, read line by line when asked for, and JSON arrays."""

import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.formats import read_row
from data.records import Record
from vlm.errors import UserError


def open_source(path: str | Path, images: Path | None = None, format: str | None = None) -> "Source":
    """The rows of a file, a folder or a data set of the hub; the format is found where it isn't given."""
    return Source(Path(path), images)


class Source:
    """The rows of one file, by number. JSONL rows are parsed when asked for, so memory doesn't grow with the file.

    images: the folder that rows' image paths are relative to and confined to; by default an `images` folder beside
    the file where there is one, else the file's own folder.
    """

    def __init__(self, path: Path, images: Path | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such data file")
        beside = path.parent / "images"
        self.images = images or (beside if beside.is_dir() else path.parent)
        if not self.images.is_dir():
            raise UserError(f"{self.images}: no such image folder")
        self._array: list[Any] | None = None
        self._starts = array("q")
        self._lines = array("q")
        self._bytes: mmap.mmap | bytes = b""
        self._open()

    def __reduce__(self) -> tuple[type["Source"], tuple[Path, Path]]:
        """A worker process that doesn't share this one's memory opens the file for itself."""
        return type(self), (self.path, self.images)

    def __len__(self) -> int:
        return len(self._array) if self._array is not None else max(0, len(self._starts) - 1)

    def __getitem__(self, index: int) -> Record:
        return read_row(self.row(index), self.where(index), self.images)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """file:line of a row, or file[index] in a JSON array."""
        if self._array is not None:
            return f"{self.path}[{index}]"
        return f"{self.path}:{self._lines[index]}"

    def row(self, index: int) -> Any:
        """The parsed row, unchecked."""
        if self._array is not None:
            return self._array[index]
        line = self._bytes[self._starts[index] : self._starts[index + 1]]
        try:
            return json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(index)}: not valid JSON ({error})") from None

    def check(self, images: int | None = None) -> None:
        """Reads every row once, so that a run doesn't find a broken one hours later. Raises for the first.

        images: rows with another number of them are broken, too.
        """
        broken: list[str] = []
        for index in range(len(self)):
            try:
                record = self[index]
                if images is not None and len(record.images) != images:
                    raise UserError(f"{record.where}: has {len(record.images)} images, where the stage takes {images}")
            except UserError as error:
                broken.append(str(error))
        if broken:
            more = f" ({len(broken) - 1} more broken rows)" if len(broken) > 1 else ""
            raise UserError(f"{broken[0]}{more}")

    def _open(self) -> None:
        with self.path.open("rb") as file:
            head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            if head[:1] == b"[":
                self._array = self._read_array()
            elif self.path.stat().st_size:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._index_lines()
        if not len(self):
            raise UserError(f"{self.path}: no rows in it")

    def _read_array(self) -> list[Any]:
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: not valid JSON ({error})") from None
        return list(rows)

    def _index_lines(self) -> None:
        start, number = 0, 0
        assert isinstance(self._bytes, mmap.mmap)
        while start < len(self._bytes):
            newline = self._bytes.find(b"\n", start)
            end = newline + 1 if newline >= 0 else len(self._bytes)
            number += 1
            if self._bytes[start:end].strip():
                self._starts.append(start)
                self._lines.append(number)
            start = end
        self._starts.append(len(self._bytes))
