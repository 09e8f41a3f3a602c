"""Where a row's image is: a file of its own, a stretch of another file (a tar), or bytes that came with the row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from PIL import Image
from PIL.ContainerIO import ContainerIO

from vlm.errors import UserError
from vlm.images import decode_image, decode_size, read_file, read_size


@dataclass(frozen=True)
class ImageSlice:
    """`size` bytes at `offset` of `file`: a member of a tar."""

    file: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}/{self.name}"

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        try:
            with self.file.open("rb") as file:
                yield cast(BinaryIO, ContainerIO(file, self.offset, self.size))
        except OSError as error:
            raise UserError(f"{self}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image that the row itself holds, as in Parquet files."""

    data: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.data


class Rows(Protocol):
    """Rows that hold an image each."""

    def where(self, index: int) -> str: ...

    def image(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class ImageRow:
    """The image of a row that is read when it's wanted: a hundred thousand of them take no room.

    key: the same for rows that show the same image.
    """

    rows: Rows = field(compare=False, repr=False)
    index: int = field(compare=False)
    key: str

    def __str__(self) -> str:
        return f"{self.rows.where(self.index)}.image"

    def read(self) -> bytes:
        return self.rows.image(self.index)


@dataclass(frozen=True)
class MissingImage:
    """An image that is named and can't be used; why: a sentence, such as that it isn't there, or lies outside."""

    name: str
    why: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        raise UserError(self.why)


ImageRef = Path | ImageSlice | ImageBytes | ImageRow | MissingImage


def read_bytes(image: ImageRef) -> bytes:
    """As they are stored. UserError when they can't be read."""
    return read_file(image) if isinstance(image, Path) else image.read()


def load_image(image: ImageRef) -> Image.Image:
    """Decoded, RGB, upright. UserError when it is none, or none that may be decoded."""
    return decode_image(read_bytes(image), str(image))


def image_size(image: ImageRef) -> tuple[int, int]:
    """(height, width) that `load_image` will give, from the header."""
    if isinstance(image, Path):
        return read_size(image)
    if isinstance(image, ImageSlice):
        with image.open() as file:
            return decode_size(file, str(image))
    return decode_size(image.read(), str(image))
