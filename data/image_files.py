"""A picture that a row names: a file below the image folder, or one that the row itself holds."""

import base64
import binascii
import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from data.pictures import ImageBytes, ImageRef, ImageSlice, MissingImage
from data.unread import BASE64
from vlm.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)
_MOST_LISTED = 200_000  # files of a folder that are looked through for a name in another case


def find_picture(where: str, image: Any, root: Path, lenient: bool = False) -> ImageRef:
    """The picture that a row names or holds. UserError where there is none; `MissingImage` instead if `lenient`."""
    if type(image) is str and image and image[:5] != "data:":
        try:
            if (found := _find_quickly(image, root)) is not None:
                return found
        except (OSError, ValueError):
            pass  # the careful look says what is wrong
    if isinstance(image, (ImageBytes, ImageSlice)):
        return image
    if isinstance(image, dict):
        image = _unfolded(where, image)
    if isinstance(image, str) and (image.startswith("data:") or (image.startswith(BASE64) and len(image) > 100)):
        return _decoded(where, image)
    if not lenient:
        return find_image(where, image, root)
    try:
        return find_image(where, image, root)
    except UserError as error:
        if not isinstance(image, str) or not image:
            raise
        return MissingImage(image, str(error))


def _unfolded(where: str, image: dict[str, Any]) -> Any:
    """{"path", "bytes"} as `datasets` writes an image, its bytes in base64."""
    held = {key: value for key, value in image.items() if value is not None}
    if held.keys() <= {"bytes", "path"} and isinstance(held.get("bytes"), str):
        return f"data:image/unknown;base64,{held['bytes']}"
    if len(held) == 1 and isinstance(name := held.get("path", held.get("url")), str):
        return name
    raise UserError(f"{where}: an image is named by its path, got {repr(image)[:80]}")


def _decoded(where: str, text: str) -> ImageBytes:
    """The image of a data URL, or of plain base64."""
    head = _DATA_URL.match(text)
    if head is None and text.startswith("data:"):
        raise UserError(f"{where}: a data URL of an image begins with data:image/...;base64, got {text[:40]!r}")
    try:
        data = base64.b64decode(text[head.end() :] if head else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: the base64 of an image can't be read ({error})") from None
    if not data:
        raise UserError(f"{where}: a data URL without an image in it")
    return ImageBytes(data, f"{where}.image")


def find_image(where: str, image: Any, root: Path) -> Path:
    """The file of an image named in a row, which must lie inside `root`, links followed."""
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: an image is named by its path, got {repr(image)[:80]}")
    if image.startswith("file://"):
        image = unquote(urlparse(image).path)
    try:
        found = _find_quickly(image, root)
    except (OSError, ValueError):
        found = None
    return found or _find_carefully(where, image, root)


def _find_quickly(image: str, root: Path) -> Path | None:
    """What most images need: their folder resolved once for all, one look at the file. None where it takes more."""
    name = str(root)
    base = real_folder(name if name[0] == "/" else f"{os.getcwd()}/{name}")  # noqa: PTH109 (this runs for every row)
    folder, _, name = image.rpartition("/")
    if image[0] == "/" or name in ("", ".", ".."):
        return None
    parent = real_folder(f"{base}/{folder}") if folder else base
    if parent != base and not parent.startswith(f"{base.rstrip('/')}/"):
        return None
    path = f"{parent}/{name}"
    state = os.lstat(path)
    return _path(path) if stat.S_ISREG(state.st_mode) and state.st_size else None


@lru_cache(maxsize=1 << 12)
def _path(path: str) -> Path:
    """Rows about one picture stand close together, and a Path takes as long to make as the look at its file."""
    return Path(path)


@lru_cache(maxsize=1 << 16)
def real_folder(path: str) -> str:
    """An absolute path without links; OSError, which isn't remembered, when nothing is there."""
    return os.path.realpath(path, strict=True)


def _find_carefully(where: str, image: str, root: Path) -> Path:
    shown = repr(image[:80])
    try:
        base = root.resolve()
        path = (base / image).resolve()
        there = path.is_file()
        empty = there and path.stat().st_size == 0
    except (OSError, ValueError, RuntimeError):  # too long, NUL or no Unicode in it, links in a circle
        raise UserError(f"{where}: image {shown} can't be the name of a file in {root}") from None
    if not there and re.match(r"(?i)[a-z][a-z0-9+.-]+://", image):
        raise UserError(
            f"{where}: image {shown} is an address; pictures aren't fetched: download it, and name the file"
        )
    if not path.is_relative_to(base):
        raise UserError(f"{where}: image {shown} lies outside the image folder {root}{_hint(image, base)}")
    if not there:
        raise UserError(f"{where}: image {shown} is not in {root}{_hint(image, base)}")
    if empty:
        raise UserError(f"{where}: image {shown} is an empty file")
    return path


def _hint(image: str, base: Path) -> str:
    """The file that was likely meant, if one is there: with the other slash, in another case, without the folder that
    the image folder is itself, or with another suffix."""
    name = image.replace("\\", "/").lstrip("/").removeprefix("./")
    steps = [step for step in name.split("/") if step not in ("", ".", "..")][:64]
    for first in range(min(len(steps), 8)):
        if (found := _as_written(base, steps[first:])) is not None:
            return f" (there is {found!r})"
    return ""


def _as_written(base: Path, steps: list[str]) -> str | None:
    """A file below `base` by these names whatever their case, or with another suffix."""
    folder = base
    for place, step in enumerate(steps):
        names = _names_in(str(folder))
        stem, _, suffix = step.rpartition(".")
        tried = [step, *(f"{stem}{other}" for other in IMAGE_SUFFIXES if stem and place == len(steps) - 1)]
        found = next((names[one.lower()] for one in tried if one.lower() in names), None)
        if found is None or (suffix and place == len(steps) - 1 and not (folder / found).is_file()):
            return None
        folder = folder / found
    try:
        inside = folder.resolve().is_relative_to(base) and folder.is_file()
    except (OSError, RuntimeError):
        return None
    return folder.relative_to(base).as_posix() if inside else None


@lru_cache(maxsize=64)
def _names_in(folder: str) -> dict[str, str]:
    """Names in a folder by themselves in small letters: only for hints, so nothing depends on its age."""
    names: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.setdefault(entry.name.lower(), entry.name)
                if len(names) == _MOST_LISTED:
                    break
    except OSError:
        return {}
    return names
