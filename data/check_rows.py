"""What a worker of `vlm data check` does: it reads rows, headers and pictures, and gives back numbers, not objects."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.looks import look
from data.pictures import ImageBytes, ImageRef, image_size, load_image, read_bytes
from data.records import Record
from data.sources import Source
from vlm.errors import UserError

if TYPE_CHECKING:
    from data.check_model import Length, ModelSpec

HEAD = 4096  # bytes that tell most files of the same size apart
Numbers = np.ndarray[Any, Any]
ROW = np.dtype(
    [("good", "?"), ("turns", "<i4"), ("images", "<i4"), ("characters", "<i8"), ("said", "<i8"), ("digest", "<u8"),
     ("id", "<u8"), ("tokens", "<i8"), ("kept", "<i8"), ("supervised", "<i8"), ("dropped", "<i4")]
)  # fmt: skip
SHOWN = np.dtype([("row", "<i8"), ("place", "<i4"), ("key", "<u8")])
HEADER = np.dtype([("good", "?"), ("height", "<i4"), ("width", "<i4"), ("bytes", "<i8"), ("digest", "<u8")])
SEEN = np.dtype([("good", "?"), ("look", "<u8")])
Place = tuple[int, int]  # number of a row, and which of its images


@dataclass(frozen=True)
class Rows:
    """rows: of type ROW, one for each row; shown: of type SHOWN, one for each image of the good rows; bad: the number
    of each other row, and what is wrong with it; ignored: how many rows have each key that nothing is read from."""

    rows: Numbers
    shown: Numbers
    bad: list[tuple[int, str]]
    ignored: dict[str, int]


class Checker:
    """Looks at the rows of a source, and with a model at their tokens. ids: rows have ids, and are read as any Source
    reads them, so that each is parsed but once for both."""

    def __init__(self, source: Source, spec: "ModelSpec | None" = None, ids: bool = False) -> None:
        self.source, self.ids = source, ids
        self.reader = None
        if spec is not None:
            from data.check_model import Reader

            self.reader = Reader(spec)

    def rows(self, start: int, stop: int) -> Rows:
        rows = np.zeros(stop - start, ROW)
        places: list[Place] = []
        keys: list[bytes] = []
        bad: list[tuple[int, str]] = []
        told: list[Any] = []
        ignored: dict[str, int] = {}
        for number in range(start, stop):
            name = 0
            try:
                if self.ids:
                    row = self.source.row(number)
                    name = _id(row)
                    record = self.source.record(row, self.source.where(number))
                else:
                    record = self.source[number]
                length = self._measure(record, number)
            except UserError as error:
                bad.append((number, self._reason(error, number)))
                told.append((False, 0, 0, 0, 0, 0, name, getattr(error, "tokens", 0), 0, 0, 0))
                continue
            for key in record.ignored:
                ignored[key] = ignored.get(key, 0) + 1
            names = [os.fspath(image) if isinstance(image, Path) else str(image) for image in record.images]
            words, characters, said = _words(record)
            same = "\x1e".join([*words, *names, *record.captions])
            told.append(
                (
                    True,
                    len(record.messages),
                    len(names),
                    characters,
                    said,
                    _number(same.encode("utf-8", "surrogatepass")),
                    name,
                    *((length.tokens, length.kept, length.supervised, length.dropped) if length else (0, 0, 0, 0)),
                )
            )
            for place, (image, file) in enumerate(zip(record.images, names, strict=True)):
                places.append((number, place))
                keys.append(_digest(image.data if isinstance(image, ImageBytes) else os.fsencode(file)))
        rows[:] = told
        shown = np.zeros(len(places), SHOWN)
        if places:
            shown["row"], shown["place"] = np.array(places).T
            shown["key"] = np.frombuffer(b"".join(keys), "<u8")
        return Rows(rows, shown, bad, ignored)

    def headers(self, places: Sequence[Place]) -> tuple[Numbers, list[tuple[int, str]]]:
        """HEADER of each image, and the number in `places` of those that are none, with the reason."""
        headers = np.zeros(len(places), HEADER)
        bad: list[tuple[int, str]] = []
        for number, image in self._images(places):
            try:
                height, width = image_size(image)
                size, head = _beginning(image)
            except (UserError, OSError) as error:
                bad.append((number, str(error)))
                continue
            headers[number] = (True, height, width, size, _number(head))
        return headers, bad

    def contents(self, places: Sequence[Place]) -> Numbers:
        """A digest of each image's bytes, 0 where they can't be read any more."""
        return np.array([_contents(image) for _, image in self._images(places)], "<u8")

    def pictures(self, places: Sequence[Place]) -> tuple[Numbers, list[tuple[int, str]]]:
        """SEEN of each image, decoded, and the number in `places` of those that can't be, with the reason."""
        seen = np.zeros(len(places), SEEN)
        bad: list[tuple[int, str]] = []
        for number, image in self._images(places):
            try:
                seen[number] = (True, look(load_image(image)))
            except (UserError, OSError) as error:
                bad.append((number, str(error)))
        return seen, bad

    def _images(self, places: Sequence[Place]) -> Iterator[tuple[int, ImageRef]]:
        known: tuple[int, Record | None] = (-1, None)
        for number, (row, place) in enumerate(places):
            if known[0] != row:
                known = (row, self.source[row])
            assert known[1] is not None
            yield number, known[1].images[place]

    def _measure(self, record: Record, number: int) -> "Length | None":
        return None if self.reader is None else self.reader.measure(record, number)

    def _reason(self, error: UserError, number: int) -> str:
        return str(error).removeprefix(f"{self.source.where(number)}: ")


def _id(row: Any) -> int:
    """A digest of the row's own id; 0 where it has none."""
    name = row.get("id") if isinstance(row, dict) else None
    if not isinstance(name, (str, int)):
        return 0
    return _number(f"{type(name).__name__} {name}".encode("utf-8", "surrogatepass"))


def _words(record: Record) -> tuple[list[str], int, int]:
    """What a row says, its characters, and those of them that assistants say."""
    words: list[str] = []
    characters = said = 0
    for message in record.messages:
        role = message["role"]
        words.append(role)
        for part in message["content"]:
            text = part.get("text", "")
            words.append(text or part["type"])
            characters += len(text)
            said += len(text) if role == "assistant" else 0
    return words, characters, said


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _number(data: bytes) -> int:
    return int.from_bytes(_digest(data), "little")


def _beginning(image: ImageRef) -> tuple[int, bytes]:
    """The size of an image's file, and its first bytes."""
    if isinstance(image, Path):
        with image.open("rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size, file.read(HEAD)
    data = image.read()
    return len(data), data[:HEAD]


def _contents(image: ImageRef) -> int:
    try:
        return _number(read_bytes(image))
    except UserError:
        return 0
