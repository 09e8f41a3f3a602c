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
            return index_records(file, tell, self._options, str(self.path))

        return indexed(f"table{self._options['delimiter']}", self.path, build)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._arrays['numbers'][index]}"

    def row(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        try:
            text = self._read(index).decode()
            # strict, so that broken quotes are an error
            (values,) = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True, **self._options) if row]
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} of the row is no UTF-8") from None
        except (csv.Error, ValueError) as error:
            raise UserError(f"{where}: not a row of a table ({error})") from None
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


def index_records(file: BinaryIO, tell: Tell, options: dict[str, Any], name: str) -> Arrays:
    """starts: of the records behind the header, and the file's end; numbers: of the lines that they begin on."""
    starts: list[int] = []
    numbers: list[int] = []
    read = [0, 0]  # bytes and lines that the reader has taken

    def lines() -> Iterator[str]:
        while line := file.readline(MOST_BYTES):
            if len(line) == MOST_BYTES:
                raise csv.Error(f"a line of more than {MOST_BYTES >> 20} MB")
            read[0] += len(line)
            read[1] += 1
            yield line.decode("latin-1")

    reader = csv.reader(lines(), **options)
    begin, number = 0, 1
    try:
        next(reader, None)
        begin, number = read[0], read[1] + 1
        for values in reader:
            if values:
                starts.append(begin)
                numbers.append(number)
            begin, number = read[0], read[1] + 1
            if len(starts) % 4096 == 0:
                tell(begin)
    except csv.Error as error:
        raise UserError(f"{name}:{number}: not a row of a table ({error}; is a quote left open?)") from None
    return {"starts": np.array([*starts, read[0]], np.int64), "numbers": np.array(numbers, np.int64)}
