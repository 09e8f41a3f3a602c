"""Plain question/answer rows, scored by equality."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.benchmarks.base import Answers, Benchmark, Item, averaged
from data.benchmarks.predictions import as_id
from data.benchmarks.scores import Scores
from data.pictures import ImageRef, MissingImage
from data.records import find_image
from data.rows import Source
from data.sources import open_source
from vlm.errors import UserError


class Exact(Benchmark):
    """Rows {"image", "question", "answer", optionally "id" and "kind"}; predictions are rows {"id", "answer"},
    or in the order of the questions.

    official: the answer is right when it equals the reference but for outer white space; normalised: case and a final
    full stop are ignored, too.
    """

    task = "exact"
    modes = ("official", "normalised")
    submission_name = "predictions.jsonl"
    id_keys = ("id", "question_id")
    ordered = True

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        source = _open(data, images, split)
        items = []
        for index in range(len(source)):
            item, row, where = _item(source, index)
            if not isinstance(row.get("question"), str):
                raise UserError(f"{where}: a row needs a question, which is text")
            image = _image(row.get("image"), where, source.images)
            items.append(Item(item.id, row["question"], item.references, image, item.groups))
        return items

    def references(self, path: Path) -> list[Item]:
        source = _open(path, None, None)
        return [_item(source, index)[0] for index in range(len(source))]

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        rows = ({"id": i, "answer": answer} for i, answer in answers.items())
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        clean = _normalise if mode == "normalised" else str.strip
        said = [answers[item.id] for item in items]
        right = [
            float(text is not None and clean(text) == clean(item.references[0]))
            for text, item in zip(said, items, strict=True)
        ]
        return averaged(self.task, mode, items, right)


def _open(path: Path, images: Path | None, split: str | None) -> Source:
    return open_source(f"{path}@{split}" if split else path, images)


def _item(source: Source, index: int) -> tuple[Item, dict[str, Any], str]:
    row, where = source.row(index), source.where(index)
    if not isinstance(row, dict) or not isinstance(row.get("answer"), str):
        raise UserError(f"{where}: a row needs an answer, which is text")
    name = as_id(row.get("id", row.get("question_id", index)))
    if name is None:
        raise UserError(f"{where}: an id is a number or text")
    kind = row.get("kind", row.get("object"))
    return Item(name, "", (row["answer"],), None, () if kind is None else (f"accuracy/{kind}",)), row, where


def _image(name: Any, where: str, folder: Path) -> ImageRef | None:
    if name is None:
        return None
    try:
        return find_image(where, name, folder)
    except UserError as error:
        if not isinstance(name, str) or not name:
            raise
        return MissingImage(name, str(error))


def _normalise(text: str) -> str:
    return text.strip().removesuffix(".").casefold()
