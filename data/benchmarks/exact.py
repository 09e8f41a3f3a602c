"""Plain question/answer rows, scored by equality. Rows are read by the readers of training, whatever their format."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.benchmarks.base import Answers, Asked, Benchmark, Item, averaged
from data.benchmarks.predictions import as_id
from data.benchmarks.scores import Scores
from data.key_map import KeyMap, read_key_map
from data.pictures import ImageBytes, ImageRef, ImageRow
from data.records import IMAGE_PART, Record, text_part
from data.row import as_text, listed
from data.row_keys import layout
from data.rows import Source
from data.sources import open_source
from vlm.errors import UserError


class Exact(Benchmark):
    """Rows of any format that training reads, optionally with "id" and "kind"; predictions are rows {"id", "answer"},
    or in the order of the questions. Asked is what stands before a row's last answer, with its pictures where they are.

    official: the answer is right when it equals a reference but for outer white space; normalised: case and a final
    full stop are ignored, too. Of several people's answers, and of captions, each is a reference.
    """

    task = "exact"
    modes = ("official", "normalised")
    submission_name = "predictions.jsonl"
    id_keys = ("id", "question_id")
    ordered = True
    columns: KeyMap = ()

    def name_columns(self, columns: Iterable[str]) -> None:
        self.columns = read_key_map(columns, "--columns")

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        source = _open(data, images, split, self.columns)
        return [_item(source, index, source.read(index, lenient=True)) for index in range(len(source))]

    def references(self, path: Path) -> list[Item]:
        source = _open(path, None, None, self.columns)
        return [_reference(source, index) for index in range(len(source))]

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        rows = ({"id": i, "answer": answer} for i, answer in answers.items())
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        clean = _normalise if mode == "normalised" else str.strip
        said = [answers[item.id] for item in items]
        right = [
            float(text is not None and clean(text) in map(clean, item.references))
            for text, item in zip(said, items, strict=True)
        ]
        return averaged(self.task, mode, items, right)


def _open(path: Path, images: Path | None, split: str | None, columns: KeyMap) -> Source:
    return open_source(f"{path}@{split}" if split else str(path), images, columns=columns)


def _item(source: Source, index: int, record: Record) -> Item:
    """A question as its row asks it. UserError for a document, which asks nothing."""
    if record.kind != "chat":
        raise UserError(f"{record.where}: a document, which has no question")
    *before, last = record.messages
    name, groups = _named(source, index, record.where)
    question = "".join(part.get("text", "") for part in before[-1]["content"])
    answer = "".join(part["text"] for part in last["content"])
    references = tuple(dict.fromkeys([answer, *record.captions, *record.answers]))
    pictures = tuple(_light(source, index, place, image) for place, image in enumerate(record.images))
    plain = len(before) == 1 and before[0]["content"] in ([text_part(question)], [IMAGE_PART, text_part(question)])
    said = tuple({"role": message["role"], "content": message["content"]} for message in before)
    asked = None if plain else Asked(said, pictures)
    return Item(name, question, references, pictures[0] if pictures else None, groups, asked=asked)


def _reference(source: Source, index: int) -> Item:
    """What a row says is right; it may leave the question out, and its pictures may lie elsewhere."""
    row, where = source.named_row(index), source.where(index)
    if isinstance(row, dict) and layout(tuple(row)).format is None:
        key = next((key for key in ("answer", "answers") if row.get(key) is not None), None)
        if key is not None:
            name, groups = _named(source, index, where)
            texts = [as_text(one, key, where) for one in listed(row[key])]
            right = [text for text in texts if text.strip()] or texts  # else no answer would be right, too
            return Item(name, "", tuple(dict.fromkeys(right)), None, groups)
    item = _item(source, index, source.read(index, lenient=True))
    return replace(item, question="", image=None, asked=None)


def _named(source: Source, index: int, where: str) -> tuple[str, tuple[str, ...]]:
    """A row's id, by default its number, and the groups that it counts for."""
    row: Any = source.named_row(index)
    row = row if isinstance(row, dict) else {}
    given = next((row[key] for key in ("id", "question_id") if row.get(key) is not None), index)
    name = as_id(given)
    if name is None:
        raise UserError(f"{where}: an id is a number or text")
    kind = row.get("kind", row.get("object"))
    return name, () if kind is None or isinstance(kind, (dict, list)) else (f"accuracy/{kind}",)


class _Pictures:
    """The pictures at one place of a source's rows."""

    def __init__(self, source: Source, place: int) -> None:
        self.source, self.place = source, place

    def where(self, index: int) -> str:
        return self.source.where(index)

    def image(self, index: int) -> bytes:
        held = self.source[index].images[self.place]
        return held.read_bytes() if isinstance(held, Path) else held.read()


def _light(source: Source, index: int, place: int, image: ImageRef) -> ImageRef:
    """The picture; bytes that a row holds are read when they are wanted: a hundred thousand of them would take room."""
    if not isinstance(image, ImageBytes):
        return image
    return ImageRow(_Pictures(source, place), index, blake2b(image.data, digest_size=16).hexdigest())


def _normalise(text: str) -> str:
    return text.strip().removesuffix(".").casefold()
