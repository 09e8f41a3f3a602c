"""Plain question/answer rows, scored by equality."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.benchmarks.base import Benchmark, Item, Scores, unique
from data.records import find_image
from data.sources import Source, open_source
from vlm.errors import UserError


class Exact(Benchmark):
    """Rows {"image", "question", "answer", optionally "id" and "kind"}.

    official: the answer is right when it equals the reference but for outer white space; normalised: case and a final
    full stop are ignored, too.
    """

    task = "exact"
    submission_name = "predictions.jsonl"

    def items(self, data: Path, images: Path | None) -> list[Item]:
        source = open_source(data, images)
        items = []
        for index in range(len(source)):
            row, where = _row(source, index)
            if not isinstance(row.get("question"), str):
                raise UserError(f"{where}: a row needs a question, which is text")
            image = find_image(where, row["image"], source.images) if row.get("image") is not None else None
            items.append(Item(_id(row, index), row["question"], (row["answer"],), image, _kind(row)))
        return items

    def references(self, path: Path) -> list[Item]:
        source = open_source(path)
        rows = (_row(source, index)[0] for index in range(len(source)))
        return [Item(_id(row, index), "", (row["answer"],), kind=_kind(row)) for index, row in enumerate(rows)]

    def read_predictions(self, path: Path) -> dict[str, str]:
        source = open_source(path)
        rows = (_row(source, index)[0] for index in range(len(source)))
        return unique([(_id(row, index), row["answer"]) for index, row in enumerate(rows)], path)

    def submission(self, answers: Mapping[str, str]) -> str:
        return "".join(
            json.dumps({"id": i, "answer": answer}, ensure_ascii=False) + "\n" for i, answer in answers.items()
        )

    def score(self, items: Sequence[Item], answers: Mapping[str, str], mode: str = "official") -> Scores:
        clean = _normalise if mode == "normalised" else str.strip
        hits = {item.id: float(clean(answers[item.id]) == clean(item.references[0])) for item in items}
        metrics = {"accuracy": _mean(list(hits.values()))}
        for kind in sorted({item.kind for item in items if item.kind is not None}):
            metrics[f"accuracy/{kind}"] = _mean([hits[item.id] for item in items if item.kind == kind])
        return Scores(self.task, mode, metrics, hits)


def _row(source: Source, index: int) -> tuple[dict[str, Any], str]:
    row, where = source.row(index), source.where(index)
    if not isinstance(row, dict) or not isinstance(row.get("answer"), str):
        raise UserError(f"{where}: a row needs an answer, which is text")
    return row, where


def _id(row: dict[str, Any], index: int) -> str:
    return str(row.get("id", row.get("question_id", index)))


def _kind(row: dict[str, Any]) -> str | None:
    kind = row.get("kind", row.get("object"))
    return None if kind is None else str(kind)


def _normalise(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
