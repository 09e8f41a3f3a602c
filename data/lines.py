"""Rows one a line (JSONL), and rows that are the elements of a JSON array."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.index import Arrays, indexed
from data.progress import Tell
from data.rows import FileRows, parse
from data.scanner import Scanner
from vlm.errors import UserError

_CHUNK = 16 << 20
_BLANK = np.frombuffer(b" \t\r\n\x0b\x0c", np.uint8)


class Lines(FileRows):
    """Rows one a line, named file:line; lines with nothing on them are none."""

    def _index(self) -> Arrays:
        def build(file: BinaryIO, tell: Tell) -> Arrays:
            return index_lines(file, tell, self.path)

        return indexed("lines", self.held, build)

    def where(self, index: int) -> str:
        number = int(self._numbers[index]) if len(self._numbers) else index + 1
        return f"{self.path}:{number}"

    def row(self, index: int) -> Any:
        return parse(self._read(index).rstrip(), lambda: self.where(index))

    @property
    def _numbers(self) -> np.ndarray[Any, Any]:
        return self._arrays["numbers"]


class Elements(FileRows):
    """The elements of a JSON array, named file[index]; what breaks it off is a broken row behind the last."""

    def _index(self) -> Arrays:
        def build(file: BinaryIO, tell: Tell) -> Arrays:
            starts, error = element_starts(Scanner(file, self.path, tell))
            why = str(error or "").removeprefix(str(self.path)).partition(": ")[2]
            return {"starts": starts, "cut": np.frombuffer(why.encode(), np.uint8)}

        arrays = indexed("elements", self.held, build)
        self.cut = arrays["cut"].tobytes().decode()
        return arrays

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def row(self, index: int) -> Any:
        if self.cut and index == len(self) - 1:
            raise UserError(f"{self.where(index)}: {self.cut}; what lies behind isn't read")
        return parse(strip_comma(self._read(index)), lambda: self.where(index))


def index_lines(file: BinaryIO, tell: Tell, path: Path | None = None) -> Arrays:
    """starts: of the lines that have something on them, and the file's end; numbers: theirs, empty where 1, 2, 3 ...

    A row's bytes go on to the next row's start, so blank lines behind it belong to them.
    """
    starts: list[np.ndarray[Any, Any]] = []
    numbers: list[np.ndarray[Any, Any]] = []
    lines = offset = begin = 0  # the line that is under way is number `lines` + 1 and begins at `begin`
    full = False  # whether something has been found on it
    while chunk := file.read(_CHUNK):
        if offset == 0 and chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path or file.name}: UTF-16, where UTF-8 is needed; save it as UTF-8")
        octets = np.frombuffer(chunk, np.uint8)
        # [N + 1] where the lines and the last, unfinished one begin in this chunk
        begins = np.concatenate(([0], np.flatnonzero(octets == ord("\n")) + 1))
        some = ~np.isin(octets[np.minimum(begins, len(chunk) - 1)], _BLANK)
        some[-1] &= begins[-1] < len(chunk)
        for index in np.flatnonzero(~some):
            end = begins[index + 1] if index + 1 < len(begins) else len(chunk)
            some[index] = bool(chunk[begins[index] : end].strip())
        some[0] |= full
        finished = np.flatnonzero(some[:-1])
        absolute = begins + offset
        absolute[0] = begin
        starts.append(absolute[finished])
        numbers.append(lines + 1 + finished)
        lines, begin, full = lines + len(begins) - 1, int(absolute[-1]), bool(some[-1])
        offset += len(chunk)
        tell(offset)
    starts.append(np.array([begin] * full + [offset]))
    numbers.append(np.array([lines + 1] * full))
    told = np.concatenate(numbers).astype(np.int64)
    counted = len(told) == 0 or told[-1] == len(told)
    return {"starts": np.concatenate(starts).astype(np.int64), "numbers": told[:0] if counted else told}


def element_starts(scanner: Scanner) -> tuple[np.ndarray[Any, Any], UserError | None]:
    """Where the elements of an array that is all of a file begin, and where the last ends; what breaks the array off
    behind some of them, which is one element more."""
    starts: list[int] = []
    end, broken = scanner.offset, None
    try:
        for _ in scanner.members():
            start, end, _ = scanner.value()
            starts.append(start)
        scanner.end()
    except UserError as error:
        if not starts:
            raise
        starts.append(end)
        broken = error
    return np.array([*starts, end], np.int64), broken


def strip_comma(text: bytes) -> bytes:
    """An element without what stands between it and the next."""
    return text.rstrip(b" \t\r\n").removesuffix(b",")
