"""LLaVA's raw answer files: their ids aren't always the benchmark's, but they hold the prompt, and so the question."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.benchmarks.predictions import as_id, json_rows

_OCR_FIRST = re.compile(r"OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)


class Names:
    """What a question is called by an id, such as its picture's, and its words; one that comes again has another name
    each time. `apart` gives both back."""

    def __init__(self) -> None:
        self._seen = Counter[str]()

    def __call__(self, name: int | str, question: str) -> str:
        both = f"{name}\n{question.strip().lower()}"
        self._seen[both] += 1
        return both if self._seen[both] == 1 else f"{both}\n{self._seen[both]}"


def apart(name: str) -> tuple[str, str]:
    """The id and the question of such a name; no question where there was no prompt."""
    known, _, rest = name.partition("\n")
    return known, rest.partition("\n")[0]


def told_apart(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file of predictions; ids of those that hold a prompt are `Names` of the id and the question in it."""
    name = Names()
    for where, row in json_rows(path):
        if isinstance(row, dict) and isinstance(prompt := row.get("prompt"), str):
            known = as_id(row.get("question_id"))
            row = row if known is None else {**row, "question_id": name(known, asked(prompt))}
        yield where, row


def asked(prompt: str) -> str:
    """The question in one of LLaVA's prompts: alone or with OCR tokens before or behind it."""
    if found := _OCR_FIRST.match(prompt):
        return found[1]
    lines = [line for line in prompt.split("\n") if not line.startswith("Reference OCR token:")]
    return lines[0] if lines else ""
