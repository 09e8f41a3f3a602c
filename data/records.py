"""`Record`: what a person wrote, checked. Every error names the file and the line."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from data.pictures import ImageBytes, ImageRef, ImageSlice
from vlm.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
Kind = Literal["chat", "document"]


@dataclass(frozen=True)
class Record:
    """One row: a sound conversation and the images it shows, in order.

    messages: content is a list of {"type": "text", "text"} and {"type": "image"} parts; captions: further answers
    that are as right as the last message's (rows of an image with several captions); where: file:line. A document is
    one message of the role "document": text and images in turn, with no chat template and all its text learned.
    """

    where: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()
    captions: tuple[str, ...] = ()
    kind: Kind = "chat"


def make_record(
    where: str,
    messages: Sequence[Message],
    images: Sequence[Any],
    root: Path,
    captions: Sequence[str] = (),
    kind: Kind = "chat",
) -> Record:
    """A Record, or a UserError that begins with `where`: broken roles, empty answers, images that aren't there.

    images: names of files below `root`, or what a source has found in itself.
    """
    if kind == "chat":
        check_roles(where, messages)
    elif not any(part.get("text", "").strip() for part in messages[0]["content"]):
        raise UserError(f"{where}: a document without text")
    texts = [part.get("text") for message in messages for part in message["content"]]
    marks = texts.count(None)
    check_texts(where, [*filter(None, texts), *captions])
    if marks != len(images):
        raise UserError(f"{where}: {marks} image placeholders, but {len(images)} images")
    found = (
        image if isinstance(image, (ImageBytes, ImageSlice)) else find_image(where, image, root) for image in images
    )
    return Record(where, tuple(messages), tuple(found), tuple(captions), kind)


def check_roles(where: str, messages: Sequence[Message]) -> None:
    """An optional system message, then user and assistant in turn, the assistant last, and no empty answer."""
    if not messages:
        raise UserError(f"{where}: no messages")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if len(turns) < len(messages) and any(part["type"] == "image" for part in messages[0]["content"]):
        raise UserError(f"{where}: message 1: an image in a system message")
    first = 1 + len(messages) - len(turns)
    for position, message in enumerate(turns):
        due = "assistant" if position % 2 else "user"
        if message["role"] != due:
            raise UserError(f"{where}: message {first + position} is from {message['role']!r}, where {due!r} is due")
        if due == "assistant":
            parts = message["content"]
            if IMAGE_PART in parts:
                raise UserError(f"{where}: message {first + position}: an image in an assistant's answer")
            if not any(not part["text"].isspace() and part["text"] for part in parts):
                raise UserError(f"{where}: message {first + position}: an empty answer")
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: the conversation doesn't end with an assistant's answer")


def check_texts(where: str, texts: Sequence[str]) -> None:
    for text in texts:
        if not text.isascii():  # which is known without a look at it
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: a text holds half of a surrogate pair, which is no character") from None


def find_image(where: str, image: Any, root: Path) -> Path:
    """The file of an image named in a row, which must lie inside `root`, links followed."""
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: an image is named by its path, got {repr(image)[:80]}")
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
    return Path(path) if stat.S_ISREG(state.st_mode) and state.st_size else None


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
    if not path.is_relative_to(base):
        raise UserError(f"{where}: image {shown} lies outside the image folder {root}")
    if not there:
        others = (path.with_suffix(suffix) for suffix in IMAGE_SUFFIXES if path.suffix)
        other = next((f" (there is {other.name})" for other in others if other.is_file()), "")
        raise UserError(f"{where}: image {shown} is not in {root}{other}")
    if empty:
        raise UserError(f"{where}: image {shown} is an empty file")
    return path


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IMAGE_PART = {"type": "image"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
