"""A benchmark's official files as downloaded: found by their names, read strictly, and what is missing is listed."""

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from data.benchmarks.base import Item
from data.benchmarks.predictions import listed, number_in_name
from data.pictures import MissingImage
from data.records import IMAGE_SUFFIXES, find_image
from vlm.errors import UserError, first_line

T = TypeVar("T")
Row = TypeVar("Row")
BROKEN = (msgspec.MsgspecError, ValueError, RecursionError)  # what a row or file raises that is of another shape
IMAGE_SETS = ("train2014", "val2014", "test2015", "train2017", "val2017", "test2017")


class Files:
    """The folder (or one file) that `--data` names. What isn't there is noted, and said by `check`."""

    def __init__(self, data: Path, split: str | None, published: str) -> None:
        """published: where people get what is missing."""
        if not data.exists():
            raise UserError(f"{data}: no such file or folder")
        self.data, self.split, self.published = data, split, published
        self.folder = data if data.is_dir() else data.parent
        self.missing: list[str] = []

    @cached_property
    def _names(self) -> list[Path]:
        """Files of the folder and of the folders in it."""
        below = [self.folder, *sorted(path for path in self.folder.iterdir() if path.is_dir())]
        return [path for folder in below for path in sorted(folder.glob("*.[jt]s*")) if path.is_file()]

    def find(self, pattern: str, official: str) -> Path:
        """The one file whose name fits `pattern`, of the split that was asked for; `official`: how it's published."""
        if self.data.is_file():
            if self.split is not None and self.split.lower() not in self.data.name.lower():
                raise UserError(f"{self.data}: one file, whose name doesn't say that it is of the split {self.split}")
            return self.data
        fitting = [path for path in self._names if fnmatch(path.name.lower(), pattern)]
        found = [path for path in fitting if self.split is None or self.split.lower() in path.name.lower()]
        if len(found) > 1:
            names = listed([path.name for path in found])
            raise UserError(f"{self.data}: several files fit ({names}); name one of them, or its split")
        if found:
            return found[0]
        others = f" (of other splits there are {listed([path.name for path in fitting])})" if fitting else ""
        self.missing.append(f"{official}{others}")
        return self.folder / official

    def pictures(self, images: Path | None, folders: Sequence[str]) -> "Pictures":
        """The folder of the pictures: `images`, or the one of `folders` that is there, or the data's own."""
        if images is not None:
            if not images.is_dir():
                raise UserError(f"{images}: no such image folder")
            return Pictures(images)
        found = [folder for name in dict.fromkeys(folders) if (folder := self.folder / name).is_dir()]
        return Pictures(found[0] if len(found) == 1 else self.folder)

    def check(self) -> None:
        if self.missing:
            raise UserError(
                f"{self.data}: not there: {'; '.join(self.missing)}. Nothing is downloaded here; it is published at "
                f"{self.published}"
            )


class Pictures:
    """Pictures of a folder, and of the image sets in it, by name or by number: COCO_val2014_000000000042.jpg is 42."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _numbered(self) -> dict[str, Path]:
        folders = [self.folder, *(self.folder / name for name in IMAGE_SETS)]
        found: dict[str, Path] = {}
        for folder in folders:
            if folder.is_dir():
                for name in os.listdir(folder):  # noqa: PTH208 (a hundred thousand of them)
                    _, dot, suffix = name.rpartition(".")
                    if f".{suffix.lower()}" in IMAGE_SUFFIXES and dot:
                        found.setdefault(number_in_name(name), folder / name)
        return found

    def by_number(self, number: int | str) -> Path | MissingImage:
        return self._numbered.get(str(number).lstrip("0") or "0") or self._missing(f"of image {number}")

    def by_name(self, name: str, folders: Sequence[str] = IMAGE_SETS) -> Path | MissingImage:
        """`name` in the folder or in one of `folders` in it; never outside."""
        for candidate in (name, *(f"{folder}/{name}" for folder in folders)):
            try:
                return find_image("", candidate, self.folder)
            except UserError:
                continue
        return self._missing(name)

    def _missing(self, name: str) -> MissingImage:
        return MissingImage(name, f"{self.folder}: no picture {name}")


def check_pictures(items: Sequence[Item]) -> None:
    """UserError when pictures of theirs are missing or empty."""
    missing: dict[str, str] = {}
    for image in dict.fromkeys(image for item in items for image in item.images):
        if isinstance(image, MissingImage):
            missing[image.name] = image.why
        elif isinstance(image, Path) and not (image.is_file() and image.stat().st_size):
            missing[image.name] = f"{image}: an empty file"
    if missing:
        raise UserError(
            f"{len(missing)} pictures are not there ({listed(list(missing))}), such as {next(iter(missing.values()))}; "
            "--allow-partial counts their questions as wrong, and asks the others"
        )


def image_sets(path: Path) -> list[str]:
    """Folders in which a file's pictures may be, that of the image set in its name first."""
    return [*sorted(IMAGE_SETS, key=lambda name: name not in path.name), "images"]


def holds_object(path: Path) -> bool:
    """Whether a JSON file is an object, and no list; a file that can't be read is none."""
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    except OSError:  # said by whoever reads it
        return False


def array_name(path: Path, *names: str) -> str:
    """Which of these lists a JSON object holds; the first where it holds none, to be missed by `read_array`."""
    try:
        held = msgspec.json.decode(_read(path), type=dict[str, msgspec.Raw])
    except BROKEN:
        return names[0]
    return next((name for name in names if name in held), names[0])


def read_array(path: Path, name: str | None, kind: type[Row], make: Callable[[int, Row], T]) -> list[T]:
    """`make(index, row)` of every row of the list `name` in a JSON object (None: of a JSON list), decoded as `kind`.

    UserError that names the first five rows that are of another shape, or that `make` raised ValueError for.
    """
    content = _read(path)

    def decode(row: Any) -> list[Any]:
        if name is None:
            return _decode(path, content, list[row], "a JSON list")
        array = msgspec.defstruct("Array", [(name, list[row])])
        return getattr(_decode(path, content, array, f"a JSON object with a list {name!r}"), name)

    try:
        if found := [make(index, row) for index, row in enumerate(decode(kind))]:
            return found
    except (UserError, *BROKEN):
        pass  # one by one, the broken rows can be named
    return _read_each(path, list(enumerate(decode(msgspec.Raw))), f"{name or ''}[{{}}]", kind, make)


def read_object(path: Path, kind: type[Row], make: Callable[[str, Row], T]) -> list[T]:
    """`make(key, row)` of every member of a JSON object, as `read_array` does."""
    rows = _decode(path, _read(path), dict[str, msgspec.Raw], "a JSON object of objects")
    return _read_each(path, list(rows.items()), "[{}]", kind, make)


def _read_each(
    path: Path, rows: list[tuple[Any, msgspec.Raw]], where: str, kind: type[Row], make: Callable[[Any, Row], T]
) -> list[T]:
    if not rows:
        raise UserError(f"{path}: nothing in it")
    decoder, found, broken = msgspec.json.Decoder(kind), [], []
    for key, row in rows:
        try:
            found.append(make(key, decoder.decode(row)))
        except BROKEN as error:
            broken.append(f"{where.format(key)}: {first_line(error)}")
    if broken:
        raise UserError(f"{path}: {len(broken)} rows can't be read ({listed(broken)})")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(path: Path, content: bytes, kind: Any, needed: str) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {needed} is needed ({first_line(error)})") from None
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
