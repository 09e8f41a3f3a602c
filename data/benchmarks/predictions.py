"""Files of predictions: read, matched with the questions, and everything that is wrong with them said at once."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard

from vlm.errors import UserError

NAMED = 5  # of what is wrong, in a message
_SURROGATES = re.compile("[\ud800-\udfff]")


class _Invalid:
    def __repr__(self) -> str:
        return "invalid JSON"


INVALID = _Invalid()


@dataclass
class Predictions:
    """answers: id -> text; broken: what is wrong with rows that can't be used; repeated: ids after their first row;
    ordered: rows have no ids and are in the order of the questions, row numbers stand for ids; numbers: id -> what
    a row holds besides, where it was asked for."""

    path: Path
    answers: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    ordered: bool = False
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """How many predictions and questions a score does without, which is asked for by --allow-partial; unscored: how
    many questions are of those that the benchmark never scores."""

    broken: int
    repeated: int
    missing: int
    unknown: int
    unscored: int = 0

    def as_notes(self) -> dict[str, Any]:
        counts = {name: count for name, count in vars(self).items() if name != "unscored"}
        unscored = {"unscored": self.unscored} if self.unscored else {}
        return unscored | ({"left_out": counts} if any(counts.values()) else {})


def read_predictions(
    path: Path,
    ids: Sequence[str],
    texts: Sequence[str],
    ordered: bool = False,
    rows: Iterable[tuple[str, Any]] | None = None,
    beside: str | None = None,
) -> Predictions:
    """Rows of a JSON array or of JSON lines; the first of the keys `ids` and `texts` that a row has is taken.

    ordered: predictions may be in the order of the questions instead, which they are where the first row has no id.
    rows: where each is and itself, of a file that is no JSON. beside: a key under which rows may have a number.
    """
    found = Predictions(path, ordered=ordered)
    undecided = ordered
    for number, (where, row) in enumerate(json_rows(path) if rows is None else rows):
        if not isinstance(row, dict):
            found.broken.append(f"{where}: an object is needed, not {_shown(row)}")
            continue
        given, text = _first(row, ids), _first(row, texts)
        if undecided:
            found.ordered, undecided = given is None, False
        if found.ordered and given is not None:
            found.broken.append(f"{where}: {_shown(given)} for an id, where the first row has none")
            continue
        name = str(number) if found.ordered else as_id(given)
        if name is None:
            found.broken.append(f"{where}: {ids[0]} is a number or text, not {_shown(given)}")
        elif not _is_text(text):
            found.broken.append(f"{where}: {texts[0]} is text, not {_shown(text)}")
        elif beside in row and not _is_number(row[beside]):
            found.broken.append(f"{where}: {beside} is a number, not {_shown(row[beside])}")
        elif name in found.answers:
            found.repeated.append(name)
        else:
            found.answers[name] = text
            if beside in row:
                found.numbers[name] = float(row[beside])
    return found


def rename(given: Predictions, ids: Collection[str], other: Callable[[str], str | None]) -> Predictions:
    """Predictions under the questions' ids, where rows have another name for them; an id stays as it is.

    other: the id that is meant by a name, None where none is known.
    """
    if given.ordered or all(name in ids for name in given.answers):
        return given

    def meant(name: str) -> str:
        return name if name in ids else other(name) or name

    found = Predictions(given.path, broken=given.broken, repeated=list(map(meant, given.repeated)))
    for name, text in given.answers.items():
        if (known := meant(name)) in found.answers:
            found.repeated.append(known)
        else:
            found.answers[known] = text
            if name in given.numbers:
                found.numbers[known] = given.numbers[name]
    return found


def number_in_name(name: str) -> str:
    """The number that a picture's file is called by: 42 of COCO_val2014_000000000042.jpg and of 0042."""
    stem, dot, suffix = name.rpartition(".")
    number = (stem if dot and not suffix.isdecimal() else name).rpartition("_")[2]
    return number.lstrip("0") or "0"


def match(
    predictions: Predictions,
    questions: Iterable[str],
    references: Path,
    allow_partial: bool,
    unscored: Collection[str] = (),
) -> tuple[dict[str, str], LeftOut]:
    """Answers in the order of the questions. UserError for whatever doesn't fit, unless it may be left out.

    unscored: ids that may have an answer, which isn't looked at.
    """
    asked = dict.fromkeys(questions)
    said = predictions.answers
    if predictions.ordered:
        names = list(asked)
        numbers = ((int(number), text) for number, text in said.items())
        said = {names[at] if at < len(names) else f"row {at + 1}": text for at, text in numbers}
    missing = [name for name in asked if name not in said]
    unknown = [name for name in said if name not in asked and name not in unscored]
    found = [
        (predictions.broken, "rows can't be used"),
        (predictions.repeated, "ids come more than once"),
        (missing, f"questions of {references} have no prediction"),
        (unknown, f"ids are not in {references}"),
    ]
    wrong = "; ".join(f"{len(items)} {what} ({listed(items)})" for items, what in found if items)
    if wrong and not allow_partial:
        raise UserError(f"{predictions.path}: {wrong}; --allow-partial scores what fits")
    answers = {name: said[name] for name in asked if name in said}
    if not answers:
        raise UserError(f"{predictions.path}: no prediction fits {references}: {wrong}")
    return answers, LeftOut(*map(len, [*(items for items, _ in found), unscored]))


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of the elements of a JSON array or of JSON lines; a line that is no JSON is INVALID."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: an empty file, where rows are needed")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a JSON file ({error})") from None
        if not rows:
            raise UserError(f"{path}: an empty list, where rows are needed")
        yield from ((f"[{index}]", row) for index, row in enumerate(rows))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = INVALID
            yield f"line {number}", row


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def as_id(value: Any) -> str | None:
    """Ids are numbers in some files and text in others."""
    return str(value) if _is_text(value) or (isinstance(value, int) and not isinstance(value, bool)) else None


def unique(names: Sequence[str], path: Path) -> None:
    """UserError when an id of a file of references comes twice."""
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    if len(counted) < len(names):
        twice = [name for name, count in counted.items() if count > 1]
        raise UserError(f"{path}: {len(twice)} ids come more than once ({listed(twice)})")


def listed(items: Sequence[str]) -> str:
    return ", ".join(items[:NAMED]) + (", ..." if len(items) > NAMED else "")


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    return None


def _is_text(value: Any) -> TypeGuard[str]:
    """Not half a surrogate pair either, which JSON can name but nothing can write."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATES.search(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and isfinite(value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]
