"""CSV and TSV files with a header: rows by column names."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.index import Arrays, indexed
from data.key_map import KeyMap
from data.progress import Tell
from data.row_keys import OTHERS, is_picture_key, meaning_of, plain_key
from data.rows import FileRows
from data.scanner import MOST_BYTES
from data.unpack import unpacked
from vlm.errors import UserError

COLUMNS = {"image_name": "image", "comment": "caption"}  # Flickr30k's names for them
_PLAIN = ("image", "images", "file_name", "caption", "captions", "text", "question", "answer", "answers", *COLUMNS)
_LISTS = ("captions", "answers", "choices", "options", "messages", "conversations", "texts", "history", "tools")
_SEPARATOR = re.compile(r'"?sep=(?P<mark>[,;|\t])"?\s*')


@dataclass(frozen=True)
class Header:
    """names of the columns; options: of csv.reader; end, line: where in the file the first record begins."""

    names: list[str]
    options: dict[str, Any]
    end: int
    line: int


class Table(FileRows):
    """Rows of a CSV or TSV file, named by the line that they begin on; quoted texts may hold line ends.

    In the columns captions, answers and images a value that begins with [ is a JSON list.
    """

    def __init__(
        self, path: Path, images: Path | None = None, row_format: str | None = None, columns: KeyMap = ()
    ) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))  # of all readers, there is none of one reader
        self._head = read_header(path, columns)
        self.header, self._options = self._head.names, self._head.options
        self._pictured = [name for name in self.header if is_picture_key(name)]
        self._lists = [name for name in self.header if plain_key(name) in _LISTS or name in self._pictured]
        super().__init__(path, images, row_format, columns)

    def _index(self) -> Arrays:
        def build(file: BinaryIO, tell: Tell) -> Arrays:
            file.seek(self._head.end)
            return index_records(file, tell, self._head, str(self.path))

        return indexed(f"table{self._options['delimiter']}", self.held, build)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._arrays['numbers'][index]}"

    def row(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        try:
            text = self._read(index).decode()
            # strict, so that broken quotes are an error
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True, **self._options) if row]
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} of the row is no UTF-8") from None
        except (csv.Error, ValueError) as error:
            hint = "; is a quote left open?" if isinstance(error, csv.Error) else ""
            raise UserError(f"{where}: not a row of a table ({error}{hint})") from None
        if len(rows) != 1:
            raise UserError(f"{where}: a line break (\\r) inside of a value; put the value in quotes")
        values = rows[0]
        if len(values) != len(self.header):
            raise UserError(f"{where}: {len(values)} values, where the header names {len(self.header)} columns")
        row: dict[str, Any] = dict(zip(self.header, values, strict=True))
        for name in self._lists:
            if row[name].lstrip().startswith("["):
                try:
                    row[name] = json.loads(row[name])
                except (ValueError, RecursionError):
                    if plain_key(name) in ("choices", "options"):  # written as Python does
                        continue
                    raise UserError(f"{where}: {name} begins like a JSON list, but is none") from None
        for name in self._pictured:
            if row[name] == "":
                del row[name]
        return row


def read_header(path: Path, columns: KeyMap = ()) -> Header:
    """The column names of a file and how its values are set apart; UserError when it names no columns that we know."""
    try:
        with (unpacked(path) if path.suffix == ".gz" else path).open("rb") as file:
            line, number, mark = b"", 0, ""
            while not line.strip(b"\xef\xbb\xbf \t\r\n"):
                if not (line := file.readline(MOST_BYTES)):
                    break
                number += 1
                if found := _SEPARATOR.fullmatch(line.decode("latin-1").removeprefix("\xef\xbb\xbf")):
                    line, mark = b"", found["mark"]  # Excel's first line
            end = file.tell()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}:{max(number, 1)}: the header isn't UTF-8; save the file as UTF-8") from None
    if "\r" in text:
        raise UserError(f"{path}: its lines end in CR alone, as old Macs wrote them; save it with LF or CRLF")
    mapped = {key for _, keys in columns for key in keys}
    likeliest: list[str] = []
    for delimiter in [mark] if mark else [",", "\t", ";", "|"]:
        names = _names(text, delimiter)
        known = [name for name in names if name in COLUMNS or name in mapped or meaning_of(name) is not None]
        if len(set(known)) > 1:
            names = [COLUMNS.get(name, name) for name in names]
            if twice := {name for name in names if names.count(name) > 1}:
                raise UserError(f"{path}:{number}: the header names {', '.join(sorted(twice))} twice")
            return Header(names, {"delimiter": delimiter, "skipinitialspace": delimiter == "|"}, end, number + 1)
        likeliest = max(likeliest, names, key=len)
    found_there = f"; this one begins with {', '.join(likeliest)[:200]!r}" if text else ", and this one is empty"
    raise UserError(
        f"{path}:{max(number, 1)}: a table begins with the names of its columns, two or more of them of "
        f"{', '.join(sorted(_PLAIN))} and their like{found_there}; {OTHERS}"
    )


def _names(text: str, delimiter: str) -> list[str]:
    """Names of columns; those that we know in small letters, one that is empty by its place."""
    names = [name.strip() for name in text.split(delimiter)]
    names = [name[1:-1].strip() if len(name) > 1 and name[0] == name[-1] == '"' else name for name in names]
    return [
        name.lower() if name.lower() in _PLAIN else name or f"column {place}"
        for place, name in enumerate(names, start=1)
    ]


def index_records(file: BinaryIO, tell: Tell, head: Header, name: str) -> Arrays:
    """starts: of the records behind the header, and the file's end; numbers: of the lines that they begin on.

    A record over several lines that isn't sound has a quote in it that was left open, or one too many: it would take
    in rows behind it, the whole rest of the file even. Its first line stays a (broken) row, and the next is read anew.
    """
    starts: list[int] = []
    numbers: list[int] = []
    offset, line = head.end, head.line  # of the line that is read next
    options, columns = head.options, len(head.names)

    def lines() -> Iterator[str]:
        nonlocal offset, line
        while text := file.readline(MOST_BYTES):
            if len(text) == MOST_BYTES:
                raise UserError(f"{name}:{line}: a line of more than {MOST_BYTES >> 20} MB")
            offset, line = offset + len(text), line + 1
            yield text.decode("latin-1")

    reader = csv.reader(lines(), strict=True, **options)
    while True:
        begin, number = offset, line
        try:
            values = next(reader, None)
        except csv.Error:
            values = [""]
        if values is None:
            break
        if line - number > 1 and len(values) not in (0, columns):
            file.seek(begin)
            offset, line = begin + len(file.readline()), number + 1
            reader = csv.reader(lines(), strict=True, **options)
        if values:
            starts.append(begin)
            numbers.append(number)
        if len(starts) % 4096 == 0:
            tell(begin)
    return {"starts": np.array([*starts, offset], np.int64), "numbers": np.array(numbers, np.int64)}
