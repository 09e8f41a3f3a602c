"""Rows as people write them, in few words."""

from typing import Any


def chat(content: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def talk(value: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}], **more}


def qa(**more: Any) -> dict[str, Any]:
    return {"question": "q", "answer": "a", **more}
