"""CSV and TSV files with a header: rows by column names."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.index import Arrays, indexed
from data.progress import Tell
from data.rows import FileRows
from data.scanner import MOST_BYTES
from vlm.errors import UserError

COLUMNS = {"image_name": "image", "comment": "caption"}  # Flickr30k's names for them
_KNOWN = {"image", "file_name", "caption", "captions", "text", "question", "answer", "answers", *COLUMNS}
_LISTS = ("captions", "answers", "images")


class Table(FileRows):
    """Rows of a CSV or TSV file, named by the line that they begin on; quoted texts may hold line ends.

    In the columns captions, answers and images a value that begins with [ is a JSON list.
    """

    def __init__(self, path: Path, images: Path | None = None, row_format: str | None = None) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))  # of all readers, there is none of one reader
        self.header, self._options = read_header(path)
        super().__init__(path, images, row_format)

    def _index(self) -> Arrays:
        def build(file: BinaryIO, tell: Tell) -> Arrays:
            return index_records(file, tell, self._options, len(self.header), str(self.path))

        return indexed(f"table{self._options['delimiter']}", self.path, build)

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
        for name in _LISTS:
            if row.get(name, "").lstrip().startswith("["):
                try:
                    row[name] = json.loads(row[name])
                except (ValueError, RecursionError):
                    raise UserError(f"{where}: {name} begins like a JSON list, but is none") from None
        if row.get("image") == "":
            del row["image"]
        return row


def read_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The column names of a file and how its values are set apart; UserError when it names no column we know."""
    try:
        with path.open("rb") as file:
            line = file.readline(MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}:1: the header isn't UTF-8; save the file as UTF-8") from None
    for delimiter in (",", "\t", ";", "|"):
        names = [name.strip() for name in text.split(delimiter)]
        names = [name[1:-1] if len(name) > 1 and name[0] == name[-1] == '"' else name for name in names]
        names = [name.strip() for name in names]
        if len(_KNOWN.intersection(names)) > 1:
            names = [COLUMNS.get(name, name) for name in names]
            if twice := {name for name in names if names.count(name) > 1}:
                raise UserError(f"{path}:1: the header names {', '.join(sorted(twice))} twice")
            return names, {"delimiter": delimiter, "skipinitialspace": delimiter == "|"}
    raise UserError(
        f"{path}:1: a table begins with the names of its columns, two or more of them of {', '.join(sorted(_KNOWN))}"
    )


def index_records(file: BinaryIO, tell: Tell, options: dict[str, Any], columns: int, name: str) -> Arrays:
    """starts: of the records behind the header, and the file's end; numbers: of the lines that they begin on.

    A record over several lines that isn't sound has a quote in it that was left open, or one too many: it would take
    in rows behind it, the whole rest of the file even. Its first line stays a (broken) row, and the next is read anew.
    """
    starts: list[int] = []
    numbers: list[int] = []
    offset, line = len(file.readline(MOST_BYTES)), 2  # of the line that is read next

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
