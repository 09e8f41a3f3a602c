"""MMBench (Liu et al. 2023): multiple choice from its tables, row by row and in circles of the same choices."""

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from data.benchmarks.base import Answers, Benchmark, Item
from data.benchmarks.choice import ScienceQA
from data.benchmarks.files import Files
from data.benchmarks.letters import read_option
from data.benchmarks.measures import Measure, mean
from data.benchmarks.predictions import Predictions, listed, read_predictions, read_text
from data.benchmarks.scores import Scores
from data.pictures import ImageRef, ImageRow, MissingImage
from data.tables import Table
from vlm.errors import UserError

CIRCLE = 1_000_000  # rows whose indexes are equal modulo this ask one question, with the choices in other places
COLUMNS = ("index", "question", "hint", *ascii_uppercase, "answer", "category", "l2-category", "source", "split")
_TABLES = {".tsv": "\t", ".csv": ","}


class MMBench(Benchmark):
    """A table with the columns index, question, hint, A, B ..., answer, category, l2-category and image.

    Predictions: rows {"index", "prediction"}, LLaVA's {"question_id", "text"}, or a table with these columns. A letter
    is read from each as VLMEvalKit reads it before it asks a language model (`read_option`). `accuracy` is that of
    rows; where the file has circles, `circular` is that of questions, of which every row must be right, and so are the
    categories, as VLMEvalKit reports them.
    """

    task = "mmbench"
    prompt = ScienceQA.prompt
    max_tokens = ScienceQA.max_tokens
    submission_name = "predictions.tsv"
    id_keys = ("index", "question_id", "id")
    text_keys = ("prediction", "text", "answer")

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        if images is not None:
            raise UserError(f"{data}: MMBench's pictures are in its table; leave the folder {images} out")
        files = Files(data, split, "https://github.com/open-compass/MMBench (MMBench-Dev)")
        path = files.find("*mmbench*.tsv", f"mmbench_{split or 'dev'}_20230712.tsv")
        files.check()
        return read_table(path, asked=True)

    def references(self, path: Path) -> list[Item]:
        items = read_table(path, asked=False)
        if without := [item.id for item in items if not item.references]:
            raise UserError(
                f"{path}: {len(without)} of {len(items)} rows have no answer ({listed(without)}), as in test splits, "
                "which MMBench's server scores"
            )
        return items

    def predictions(self, path: Path) -> Predictions:
        kind = path.suffix.lower()
        if kind in (".xlsx", ".xls"):
            raise UserError(f"{path}: a spreadsheet; save it as a table of text (.tsv or .csv)")
        rows = _table_rows(path, _TABLES[kind]) if kind in _TABLES else None
        return read_predictions(path, self.id_keys, self.text_keys, rows=rows)

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        """The table without pictures and with the column `prediction`."""
        names = [name for name in COLUMNS if any(name in item.details.row for item in items)]
        text = io.StringIO(newline="")
        table = csv.writer(text, "excel-tab")
        table.writerow([*names, "prediction"])
        for item in items:
            table.writerow([*(item.details.row.get(name, "") for name in names), answers[item.id]])
        return text.getvalue()

    def choices(self, item: Item) -> tuple[str, ...]:
        return tuple(item.details.options)

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        read = [read_option(answers[item.id] or "", item.details.options) for item in items]
        right = np.array([letter == item.references[0] for letter, item in zip(read, items, strict=True)], float)
        unparsed = [
            {"id": item.id, "answer": answers[item.id]}
            for letter, item in zip(read, items, strict=True)
            if letter is None and answers[item.id] is not None
        ]
        notes: dict[str, Any] = {"unparsed": len(unparsed), "unparsed_answers": unparsed}
        rows: dict[int, list[int]] = {}  # of each question, its own row before those of its circle
        for place in sorted(range(len(items)), key=lambda place: int(items[place].id)):
            rows.setdefault(circle_of(items[place]), []).append(place)
        questions = list(rows.values())
        # questions are drawn for intervals: the rows of one say much the same
        sums = [(right[places].sum(), len(places)) for places in questions]
        whole = [float(right[places].all()) for places in questions]
        measures = {"accuracy": Measure(np.array(sums))}
        if any(int(item.id) >= CIRCLE for item in items):
            measures["circular"] = mean(whole)
            notes["questions"] = len(questions)
            if cut := sum(len(some) < len(items[some[0]].details.options) for some in questions):
                notes["circles_cut_short"] = cut
        members: dict[str, list[float]] = {}
        for places, value in zip(questions, whole, strict=True):
            for group in items[places[0]].groups:
                members.setdefault(group, []).append(value)
        measures |= {name: mean(some) for name, some in members.items()}
        per_item = {item.id: float(value) for item, value in zip(items, right, strict=True)}
        return Scores(self.task, mode, measures, per_item, notes)


@dataclass(frozen=True, slots=True)
class Details:
    """options: letter -> text; row: what a submission repeats."""

    options: Mapping[str, str]
    row: Mapping[str, str]


class Pictures:
    """The pictures of a table, decoded when they're wanted."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def where(self, index: int) -> str:
        return self._table.where(index)

    def image(self, index: int) -> bytes:
        text = "".join(_picture(self._table.row(index)).split())
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise UserError(f"{self.where(index)}: its image is no base64 ({error})") from None


def read_table(path: Path, asked: bool) -> list[Item]:
    """The rows of a file, with their pictures where they are asked; UserError that names the first five that can't be
    read."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    table = Table(path)
    needed = ("index", "question", "A", *(["image"] if asked else []))
    if missing := [name for name in needed if name not in table.header]:
        raise UserError(f"{path}:1: MMBench's table has no column {', '.join(missing)} here")
    items, shown, broken = list[Item](), list[str](), list[str]()
    for place in range(len(table)):
        where = table.where(place)
        try:
            row = table.row(place)
            items.append(make_item(row, None))
            text = _picture(row)
            shown.append(_key(text) if text and not _is_index(text) else text)
        except (UserError, ValueError) as error:
            broken.append(f"line {where.rpartition(':')[2]}: {str(error).removeprefix(f'{where}: ')}")
    if broken:
        raise UserError(f"{path}: {len(broken)} rows can't be read ({listed(broken)})")
    if not asked:
        return items
    pictures, places = Pictures(table), {item.id: place for place, item in enumerate(items)}

    def image(place: int) -> ImageRef:
        other = places.get(str(int(shown[place])), place) if _is_index(shown[place]) else place
        if shown[other] and not _is_index(shown[other]):
            return ImageRow(pictures, other, shown[other])
        why = f"its image is that of row {shown[place]}, which holds none" if shown[place] else "no image in it"
        return MissingImage(f"of row {items[place].id}", f"{table.where(place)}: {why}")

    return [replace(item, image=image(place)) for place, item in enumerate(items)]


def make_item(row: Mapping[str, Any], image: ImageRef | None) -> Item:
    """A row of a file or of a data set of columns; ValueError for one that isn't MMBench's.

    Missing are empty values, "nan" and "none", as for LLaVA; but an option "None" is there where it is the answer.
    """
    told = {name if len(name) == 1 else name.lower().replace("_", "-"): value for name, value in row.items()}
    number = told.pop("index", None)
    if isinstance(number, str) and number.isascii() and number.strip().isdigit():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"index is a whole number, not {_shown(number)}")
    texts = {name: told[name] for name in COLUMNS if told.get(name) is not None}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is text, not {_shown(value)}")
    there = {name: value for name, value in texts.items() if value.strip().lower() not in ("", "nan")}
    answer = there.get("answer", "").strip()
    answer = "" if answer.lower() == "none" else answer
    there = {name: value for name, value in there.items() if name == answer or value.strip().lower() != "none"}
    options = {letter: there[letter] for letter in ascii_uppercase if letter in there}
    if "question" not in there or not options:
        raise ValueError(f"no {'options' if 'question' in there else 'question'}")
    if answer and answer not in options:
        raise ValueError(f"answer {_shown(answer)}, where the options are {', '.join(options)}")
    lines = [there["question"], *(f"{letter}. {text}" for letter, text in options.items())]
    groups = tuple(f"{name}/{there[name]}" for name in ("category", "l2-category") if name in there)
    return Item(
        str(number),
        "\n".join([there["hint"], *lines] if "hint" in there else lines),
        (answer,) if answer else (),
        image,
        groups,
        Details(options, {"index": str(number), **{name: there.get(name, "") for name in texts}}),
    )


def circle_of(item: Item) -> int:
    """The same for rows that ask one question about one picture."""
    return int(item.id) % CIRCLE


def _picture(row: Mapping[str, Any]) -> str:
    text = str(row.get("image", "")).strip()
    return "" if text.lower() in ("nan", "none") else text


def _is_index(text: str) -> bool:
    """What stands for a picture is the index of another row, which has it."""
    return text.isdecimal() and len(text) <= 64


def _key(text: str) -> str:
    return f"base64 {blake2b(text.encode(), digest_size=16).hexdigest()}"


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                columns = len(reader.fieldnames or ())
                raise UserError(f"{path}:{reader.line_num}: more values than the header's {columns} columns")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a row of a table ({error})") from None
    if reader.line_num < 2:
        raise UserError(f"{path}: no rows in it")


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]
