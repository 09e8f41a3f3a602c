"""Rows as people write them, in few words."""

from pathlib import Path
from typing import Any

from data.formats import read_row


def chat(content: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def talk(value: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}], **more}


def qa(**more: Any) -> dict[str, Any]:
    return {"question": "q", "answer": "a", **more}


def said(row: dict[str, Any], root: Path) -> tuple[list[str], list[str]]:
    """Messages as `role: text`, an image as its number in brackets; and the images' names."""
    record = read_row(row, "rows:3", root)
    number, told = 0, []
    for message in record.messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                parts.append(f"[{number}]")
                number += 1
            else:
                parts.append(part["text"])
        told.append(f"{message['role']}: {''.join(parts)}")
    assert number == len(record.images)
    return told, [image.name for image in record.images if isinstance(image, Path)]
