"""Rows of a question and its answer: VQA, alpaca, query/response, prompt/completion, POPE, multiple choice."""

from collections import Counter
from typing import Any

from data.choices import ask, labels_of, letter_of, read_choices
from data.marks import Turn
from data.records import Record
from data.row import Row, as_text, kind_of
from data.row_keys import OTHERS, meaning_of, plain_key
from data.rows_to_records import make_chat
from data.turns import read_turns
from data.unread import check_media, is_empty, media_names
from vlm.errors import UserError

_YES_NO = ("yes", "no")
_MADE = ("target", "output", "completion", "solution", "label", "groundtruth")  # which a picture may be, too


def read_question(row: Row) -> Record:
    """{"question", "answer" or "answers", pictures}, or their relatives.

    Of several people's answers the most frequent one is learned, the first of these where there are several.
    """
    where, has = row.where, row.layout.keys
    key = row.key("question", "instruction", "prompt", "input", "text")
    if key is not None and _is_chat(row.data[key]):
        return _chat(row, key)
    if key is None:  # a blank one is asked as it is
        key = next((key for key in row.layout.keys.get("question", ()) if isinstance(row.data[key], str)), None)
    if key is None:
        raise UserError(f"{where}: no question in it (keys: {_keys(row)}); {OTHERS}")
    question = as_text(row.data[key], key, where)
    if key in has.get("input", ()) or key in has.get("prompt", ()) or key in has.get("text", ()):
        check_media(key, list(media_names(question)), where, ())
    if "input" in has and has["input"][0] != key and (more := row.text("input")) is not None:
        check_media(has["input"][0], list(media_names(more)), where, ())
        question = f"{question}\n{more}"
    if len(has) > 2 or len(has.get("question", ())) > 1:
        row.ignored.update(other for name in ("question", "instruction", "prompt") for other in has.get(name, ()))
        row.ignored.discard(key)
        if (context := _context(row)) is not None:
            question = f"Context: {context}\n{question}"
    answer, answers = _answer(row, key)
    if ("choices" in has or row.layout.letters) and (choices := _choices(row)) is not None:
        question, answer, answers = (
            ask(question, choices),
            letter_of(answer, choices, where, labels_of(row.value("choices"))),
            (),
        )
    turns = [Turn("user", question), Turn("assistant", answer)]
    turns = [*_history(row), *turns] if "history" in has else turns
    return make_chat(row, turns, answers=answers)


def _keys(row: Row) -> str:
    return ", ".join(map(str, row.given))[:200]


def _context(row: Row) -> str | None:
    """A text, or passages one below the other."""
    key = row.key("context")
    if key is None or not isinstance(row.data[key], list):
        return row.text("context")
    return "\n".join(as_text(passage, f"each of {key}", row.where) for passage in row.data[key])


def _answer(row: Row, asked: str) -> tuple[str, tuple[str, ...]]:
    """The answer that is learned, and all answers where there are several."""
    where, key = row.where, row.key("answer", "label")
    if len(every := row.layout.keys.get("answer", ())) > 1:
        row.ignored.update(other for other in every if other != key and not is_empty(row.data[other]))
    if key is None:
        given = next(iter(row.layout.keys.get("answer", row.layout.keys.get("label", ()))), None)
        if given is not None and isinstance(row.data[given], str):
            return row.data[given], ()  # empty, as the check of turns will say
        null = next((key for key in row.nulls if meaning_of(key) in ("answer", "label")), None)
        found = f"{null} is {kind_of(row.nulls[null])}" if null is not None else f"keys: {_keys(row)}"
        found = f"{given} is {kind_of(row.data[given])}" if given is not None else found
        raise UserError(f"{where}: a question without an answer ({found}); {OTHERS}")
    value = row.data[key]
    if plain_key(key) in _MADE:
        check_media(key, list(media_names(value)), where, ())
    if asked in row.layout.keys.get("text", ()) and key in row.layout.keys.get("label", ()):
        text = as_text(value, key, where)
        if text.strip().lower() not in _YES_NO and "?" not in str(row.data[asked]):
            raise UserError(
                f"{where}: {asked} with {key} {text[:40]!r} may be question and answer, or a caption and its class; "
                f"columns: {{question: {asked}, answer: {key}}} or {{caption: {asked}, ignore: {key}}} says which"
            )
        return text, ()
    if isinstance(value, dict):  # lists side by side, as `datasets` keeps a list of objects
        value = next((value[name] for name in ("text", "answer") if isinstance(value.get(name), list | str)), value)
    if isinstance(value, list):
        texts = [_one(one, key, where) for one in value]
        learned = most_frequent(texts)
        every = tuple(dict.fromkeys([learned, *(text for text in texts if text.strip())])) if learned else ()
        return learned, every if len(every) > 1 else ()
    return as_text(value, key, where), ()


def _one(answer: Any, key: str, where: str) -> str:
    if isinstance(answer, dict):
        answer = next((answer[name] for name in ("answer", "text") if name in answer), answer)
    return as_text(answer, f"each of {key}", where)


def most_frequent(answers: list[str]) -> str:
    """The answer that most people gave; blank where nobody gave one."""
    return Counter([text for text in answers if text.strip()] or [""]).most_common(1)[0][0]


def _choices(row: Row) -> list[str] | None:
    if (key := row.key("choices")) is not None:
        choices = read_choices(row.data[key], key, row.where)
        row.ignored.update(letter for letter in row.layout.letters if row.data[letter] not in choices)
        return choices
    letters = [key for key in row.layout.letters if not is_empty(row.data[key]) and row.data[key] != "nan"]
    if not letters:
        return None
    return read_choices({key: row.data[key] for key in letters}, "A, B, ...", row.where)


def _history(row: Row) -> list[Turn]:
    """[[question, answer], ...] of the turns before."""
    history = row.value("history")
    if history is None:
        return []
    turns: list[Turn] = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{row.where}: history {number} must be a question and its answer, not {kind_of(pair)}")
        said = [as_text(text, f"history {number}", row.where) for text in pair]
        turns += [Turn("user", said[0]), Turn("assistant", said[1])]
    return turns


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _chat(row: Row, key: str) -> Record:
    """Prompt and completion as lists of messages, as TRL has them."""
    answer = row.value("answer")
    turns = read_turns(row.data[key], "messages", row.where, row.ignored)
    if _is_chat(answer):
        turns += read_turns(answer, "messages", row.where, row.ignored)
    else:
        turns.append(Turn("assistant", _answer(row, key)[0]))
    return make_chat(row, turns)
