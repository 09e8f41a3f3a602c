"""`Record`: what a person wrote, checked. Every error names the file and the line."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.image_files import IMAGE_SUFFIXES, find_image, find_picture, real_folder
from data.pictures import ImageRef
from vlm.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "Message", "Record", "find_image", "make_record", "real_folder", "text_part"]
Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
Kind = Literal["chat", "document"]


@dataclass(frozen=True)
class Record:
    """One row: a sound conversation and the images it shows, in order.

    messages: content is a list of {"type": "text", "text"} and {"type": "image"} parts, and an assistant's message with
    "weight": 0 isn't learned; captions: further answers that are as right as the last message's (rows of an image with
    several captions), one of which is drawn each time; where: file:line. A document is one message of the role
    "document": text and images in turn, with no chat template and all its text learned. answers: what several people
    answered, of which the most frequent is learned; ignored: keys of the row that were left out.
    """

    where: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()
    captions: tuple[str, ...] = ()
    kind: Kind = "chat"
    answers: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False, repr=False)


def make_record(
    where: str,
    messages: Sequence[Message],
    images: Sequence[Any],
    root: Path,
    captions: Sequence[str] = (),
    kind: Kind = "chat",
    *,
    answers: Sequence[str] = (),
    ignored: Iterable[str] = (),
    lenient: bool = False,
) -> Record:
    """A Record, or a UserError that begins with `where`: broken roles, empty answers, images that aren't there.

    images: names of files below `root`, or what a source has found in itself; lenient: an image that isn't there is a
    `MissingImage`.
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
    found = tuple([find_picture(where, image, root, lenient) for image in images])
    return Record(where, tuple(messages), found, tuple(captions), kind, tuple(answers), tuple(ignored))


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
            if len(parts) == 1 and (text := parts[0].get("text")) and not text.isspace():
                continue
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


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IMAGE_PART = {"type": "image"}
