"""Rows of the formats that people have -> Records. The format of a row is read off its keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.records import IMAGE_PART, ROLES, Message, Record, make_record, text_part
from vlm.errors import UserError

CAPTION_PROMPT = "describe the picture."
_LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_row(row: Any, where: str, root: Path) -> Record:
    """One parsed row -> Record; UserError with `where` for anything that isn't sound."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object, not {type(row).__name__}")
    for key, read in _FORMATS.items():
        if key in row:
            return read(row, where, root)
    raise UserError(
        f"{where}: unknown kind of row (keys: {', '.join(map(str, row)) or 'none'}); known: {', '.join(_FORMATS)}"
    )


def _messages(row: dict[str, Any], where: str, root: Path) -> Record:
    """{"messages": [{"role", "content": text or [{"type": "text", "text"}, {"type": "image", "image"}]}]}"""
    if not isinstance(row["messages"], list):
        raise UserError(f"{where}: messages must be a list")
    images: list[Any] = []
    messages: list[Message] = []
    for number, message in enumerate(row["messages"], start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {number} needs a role of {', '.join(ROLES)}")
        messages.append(
            {
                "role": message["role"],
                "content": _parts(message.get("content"), f"{where}: message {number}", images),
            }
        )
    return make_record(where, messages, images, root)


def _parts(content: Any, where: str, images: list[Any]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [text_part(content)]
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be text or a list of parts, not {type(content).__name__}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            images.append(part.get("image"))
            parts.append(IMAGE_PART)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(text_part(part["text"]))
        else:
            raise UserError(f"{where}: a part is of type text (with a text) or image, got {str(part)[:80]}")
    return parts


def _llava(row: dict[str, Any], where: str, root: Path) -> Record:
    """LLaVA: {"image": path or list, "conversations": [{"from": human|gpt, "value": "<image>\\n..."}]}"""
    images = row.get("image") or row.get("images") or []
    images = images if isinstance(images, list) else [images]
    messages: list[Message] = []
    if not isinstance(row["conversations"], list):
        raise UserError(f"{where}: conversations must be a list")
    for number, turn in enumerate(row["conversations"], start=1):
        role = _LLAVA_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise UserError(f"{where}: turn {number} needs a 'from' of human or gpt and a text 'value'")
        messages.append(
            {
                "role": role,
                "content": _split_marks(turn["value"]) if role == "user" else [text_part(turn["value"])],
            }
        )
    return make_record(where, messages, images, root)


def _split_marks(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for position, piece in enumerate(re.split(r"\n?<image>\n?", text)):
        if position:
            parts.append(IMAGE_PART)
        if piece:
            parts.append(text_part(piece))
    return parts or [text_part(text)]


def _captions(row: dict[str, Any], where: str, root: Path) -> Record:
    """{"image", "caption": text} or {"image", "captions": [text, ...]}"""
    captions = row.get("captions", row.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f"{where}: captions must be one text or a list of them, none empty")
    prompt = CAPTION_PROMPT if row.get("prompt") is None else row["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt must be a text, not {type(prompt).__name__}")
    messages = [
        {"role": "user", "content": [IMAGE_PART, text_part(prompt)]},
        {"role": "assistant", "content": [text_part(captions[0])]},
    ]
    return make_record(where, messages, [row.get("image")], root, captions)


def _question(row: dict[str, Any], where: str, root: Path) -> Record:
    """{"image" (optional), "question", "answer"}"""
    question, answer = row["question"], row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{where}: question and answer must be texts")
    images = [row["image"]] if row.get("image") is not None else []
    messages = [
        {"role": "user", "content": [*([IMAGE_PART] if images else []), text_part(question)]},
        {"role": "assistant", "content": [text_part(answer)]},
    ]
    return make_record(where, messages, images, root)


_FORMATS: dict[str, Callable[[dict[str, Any], str, Path], Record]] = {
    "messages": _messages,
    "conversations": _llava,
    "captions": _captions,
    "caption": _captions,
    "question": _question,
}
