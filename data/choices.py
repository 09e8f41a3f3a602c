"""Questions of multiple choice as ScienceQA's are asked: lettered options below the question, a letter to answer."""

import ast
import json
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from data.row import as_text, kind_of
from vlm.errors import UserError

LETTER_ANSWER = "{question}\nAnswer with the option's letter from the given choices directly."
_LETTERED = re.compile(r"\(?([A-Z])[.):]\s+(?=\S)")  # an option that has its letter already
_MOST_CHARACTERS = 100_000  # of a list that a text writes down
_IGNORED = "columns: {{ignore: {key}}} leaves it out"


def read_choices(value: Any, key: str, where: str) -> list[str]:
    """The texts of a list, of {"A": text, ...}, of {"text": [...], "label": [...]}, or of a list written down."""
    if isinstance(value, str):
        value = _written(value, key, where)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, dict):
        names = [name for name, text in value.items() if text is not None]
        if names != list(ascii_uppercase[: len(names)]):
            raise UserError(
                f"{where}: {key} must be a list of texts, or an object with A, B, ..., not {kind_of(value)}; "
                f"{_IGNORED.format(key=key)}"
            )
        value = [value[name] for name in names]
    if not isinstance(value, list) or not 2 <= len(value) <= len(ascii_uppercase):
        count = f", not of {len(value)}" if isinstance(value, list) else f", not {kind_of(value)}"
        raise UserError(
            f"{where}: {key} must be a list of 2 to {len(ascii_uppercase)} texts{count}; {_IGNORED.format(key=key)}"
        )
    texts = [as_text(text, key, where).strip() for text in value]
    lettered = [_LETTERED.match(text) for text in texts]
    if [found and found[1] for found in lettered] == [*ascii_uppercase[: len(texts)]]:
        return [text[found.end() :] for text, found in zip(texts, lettered, strict=True) if found]
    return texts


def _written(text: str, key: str, where: str) -> Any:
    for read in (json.loads, ast.literal_eval) if len(text) < _MOST_CHARACTERS else ():
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise UserError(f"{where}: {key} must be a list of texts, not the text {text[:60]!r}; {_IGNORED.format(key=key)}")


def ask(question: str, choices: Sequence[str]) -> str:
    """The question with its lettered options below it and what is to be answered, but for what it says itself."""
    lettered = list(zip(ascii_uppercase, choices, strict=False))
    if not all(re.search(rf"(?<!\w)\(?{a}[.):]\s*{re.escape(choice)}(?!\w)", question) for a, choice in lettered):
        question = "\n".join([question, *(f"{letter}. {choice}" for letter, choice in lettered)])
    order = LETTER_ANSWER.removeprefix("{question}")
    return question if order.strip() in question else question + order


def labels_of(value: Any) -> list[str]:
    """What {"text": [...], "label": [...]} calls its choices, in their order."""
    labels = value.get("label") if isinstance(value, dict) and isinstance(value.get("text"), list) else None
    return [str(label).strip() for label in labels] if isinstance(labels, list) else []


def letter_of(answer: Any, choices: Sequence[str], where: str, labels: Sequence[str] = ()) -> str:
    """The letter of a right answer: its letter, its number (from 0 on) or its words. UserError where it may be two."""
    text = as_text(answer, "answer", where).strip()
    if len(labels) == len(choices) and labels.count(text) == 1:
        return ascii_uppercase[labels.index(text)]
    if found := _LETTERED.match(text):
        place, words = ascii_uppercase.index(found[1]), text[found.end() :].casefold()
        text = found[1] if [choice.casefold() for choice in choices[place : place + 1]] == [words] else text
    by_words = {place for place, choice in enumerate(choices) if choice == text}
    by_words = by_words or {place for place, choice in enumerate(choices) if choice.casefold() == text.casefold()}
    letter = text.strip("().: ").upper()
    by_letter = {ascii_uppercase.index(letter)} if len(letter) == 1 and letter in ascii_uppercase else set()
    by_number = {int(text)} if text.isascii() and text.isdecimal() and len(text) < 4 else set()
    places = {place for place in by_words | by_letter | by_number if place < len(choices)}
    if len(places) == 1:
        return ascii_uppercase[places.pop()]
    letters = ", ".join(ascii_uppercase[place] for place in sorted(places))
    shown = f"may be {letters} of the choices, by its words or its place" if places else "is none of the choices"
    raise UserError(
        f"{where}: the answer {text[:60]!r} {shown} ({', '.join(choices)[:80]!r}); an answer is a letter, a number "
        "from 0 on, or the words of one choice"
    )
