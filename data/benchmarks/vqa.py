"""VQA accuracy over ten human answers, as the official script computes it (Antol et al. 2015; VQA v2 evaluation)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.benchmarks.base import Benchmark, Item, Scores, read_json, unique
from data.benchmarks.vqa_text import clean, process
from data.formats import SHORT_ANSWER
from vlm.errors import UserError


class VQA(Benchmark):
    """Official questions and annotations files; `data` is the questions file or a folder that holds both.

    official: bit-equal to the script, which normalises nothing where all ten answers are the same; normalised: always
    normalises, and leaves one annotator out by position instead of by inequality.
    """

    task = "vqav2"
    prompt = SHORT_ANSWER

    def items(self, data: Path, images: Path | None) -> list[Item]:
        files = (
            sorted(data.glob("*.json")) if data.is_dir() else [data, *sorted(data.parent.glob("*annotations*.json"))]
        )
        questions = [row for path in files for row in _rows(path, "questions")]
        if not questions:
            raise UserError(f"{data}: no VQA questions file there (a JSON object with 'questions')")
        known = {item.id: item for path in files for item in self._annotated(path)}
        items = []
        folder = images or (data if data.is_dir() else data.parent)
        pictures = _pictures(folder)
        for row in questions:
            if missing := [key for key in ("question_id", "question", "image_id") if key not in row]:
                raise UserError(f"{data}: a question without {', '.join(missing)}: {str(row)[:80]}")
            item = known.get(str(row["question_id"]), Item(str(row["question_id"]), "", ()))
            image = pictures.get(str(row["image_id"]).lstrip("0"))
            if image is None:
                raise UserError(f"{folder}: no picture of image {row['image_id']} (COCO_*_{row['image_id']:0>12}.jpg)")
            items.append(replace(item, question=row["question"], image=image))
        return items

    def references(self, path: Path) -> list[Item]:
        items = self._annotated(path)
        if not items:
            raise UserError(f"{path}: not a VQA annotations file (a JSON object with 'annotations')")
        return items

    def _annotated(self, path: Path) -> list[Item]:
        for index, row in enumerate(_rows(path, "annotations")):
            answers = row.get("answers")
            sound = isinstance(answers, list) and answers and all(_is_answer(answer) for answer in answers)
            if not sound or not {"question_id", "answer_type", "question_type"} <= row.keys():
                raise UserError(f"{path}: annotation {index} needs question_id, answers, answer_type, question_type")
        return [
            Item(
                str(row["question_id"]),
                "",
                tuple(answer["answer"] for answer in row["answers"]),
                kind=row["answer_type"],
                details=row,
            )
            for row in _rows(path, "annotations")
        ]

    def read_predictions(self, path: Path) -> dict[str, str]:
        rows = read_json(path)
        if not isinstance(rows, list) or not rows:
            raise UserError(f'{path}: predictions are a list of {{"question_id", "answer"}} objects')
        pairs = []
        for index, row in enumerate(rows):
            if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("answer"), str):
                raise UserError(f"{path}[{index}]: a prediction needs a question_id and an answer, which is text")
            pairs.append((str(row["question_id"]), row["answer"]))
        return unique(pairs, path)

    def submission(self, answers: Mapping[str, str]) -> str:
        return json.dumps([{"question_id": int(i) if i.isdigit() else i, "answer": a} for i, a in answers.items()])

    def score(self, items: Sequence[Item], answers: Mapping[str, str], mode: str = "official") -> Scores:
        accuracy = _official if mode == "official" else _normalised
        per_item: dict[str, float] = {}
        groups: dict[str, list[float]] = {}
        for item in items:
            value = accuracy(answers[item.id], item.details["answers"])
            per_item[item.id] = value * 100
            for name in (
                "accuracy",
                f"accuracy/{item.kind}",
                f"question_type/{item.details['question_type']}",
            ):
                groups.setdefault(name, []).append(value)
        metrics = {name: 100 * sum(values) / len(values) for name, values in groups.items()}
        return Scores(self.task, mode, metrics, per_item)


def _official(answer: str, annotators: list[dict[str, Any]]) -> float:
    answer = clean(answer)
    said = [{**one, "answer": clean(one["answer"])} for one in annotators]
    if len({one["answer"] for one in said}) > 1:
        answer = process(answer)
        said = [{**one, "answer": process(one["answer"])} for one in said]
    scores = []
    for one in said:
        others = [other for other in said if other != one]
        scores.append(min(1.0, sum(other["answer"] == answer for other in others) / 3))
    return sum(scores) / len(scores)


def _normalised(answer: str, annotators: list[dict[str, Any]]) -> float:
    answer = process(clean(answer))
    hits = [process(clean(one["answer"])) == answer for one in annotators]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def _is_answer(answer: Any) -> bool:
    return isinstance(answer, dict) and isinstance(answer.get("answer"), str)


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    content = read_json(path)
    rows = content.get(key, []) if isinstance(content, dict) else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: {key!r} is no list of objects")
    return rows


def _pictures(folder: Path) -> dict[str, Path]:
    """Images of a folder by their number: COCO_val2014_000000000042.jpg and 42.jpg are both 42."""
    found = (path for path in folder.iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
    return {path.stem.rpartition("_")[2].lstrip("0"): path for path in found}
