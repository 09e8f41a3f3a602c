"""VizWiz: questions of blind people about their photographs (Gurari et al. 2018), ten answers each."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data.benchmarks.base import Item, Matched
from data.benchmarks.files import Files, holds_object, read_array
from data.benchmarks.measures import Array, AveragePrecision, Measure, share
from data.benchmarks.predictions import Predictions, number_in_name, read_predictions, rename
from data.benchmarks.scores import Scores
from data.benchmarks.vqa import VQA, Answer, agreement, normalised, texts_of
from data.benchmarks.vqa_text import clean, process


class VizWiz(VQA):
    """[{"image", "question", "answers", "answer_type"}], or VQA's two files; predictions [{"image", "answer"}].

    official: VizWiz's own program, which always normalises the prediction, never the annotators' answers, and leaves
    one annotator out by position; normalised: normalises those, too. The published program's contractions have
    typographic apostrophes, so that most can match nothing; VQA's are used. Submissions are as LLaVA's. Where
    predictions hold `answerable`, 0 to 1, average precision and F1 of the unanswerable questions are scored, too.
    """

    task = "vizwiz"
    prompt = (
        "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    id_keys = ("image", "question_id", "id")
    folders = ("val", "test", "train")

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        if data.is_file() and holds_object(data):
            return super().items(data, images, split)
        files = Files(data, split, "https://vizwiz.org/tasks-and-datasets/vqa/")
        path = files.find("*.json", f"{split or 'val'}.json")
        files.check()
        pictures = files.pictures(images, [path.stem, *self.folders, "images"])

        def ask(_: int, row: Photo) -> Item:
            return _photo(row, row.question, pictures.by_name(row.image, self.folders))

        return read_array(path, None, Photo, ask)

    def references(self, path: Path) -> list[Item]:
        if holds_object(path):
            return super().references(path)
        return read_array(path, None, PhotoReference, lambda _, row: _photo(row, "", None))

    def renamed(self, given: Predictions, items: Sequence[Item], references: Path) -> Predictions:
        """Photographs may be named where questions have numbers, and the other way round: VizWiz_val_00000012.jpg is
        question 12."""
        if holds_object(references):
            names = dict(read_array(references, "annotations", Named, lambda _, row: (row.image_id, row.question_id)))
            known = {str(image): str(question) for image, question in names.items()}
        else:
            known = {number_in_name(item.id): item.id for item in items}
        return rename(given, {item.id for item in items}, known.get)

    def accuracy(self, mode: str) -> Callable[[str, Item], float]:
        return official if mode == "official" else normalised

    def predictions(self, path: Path) -> Predictions:
        return read_predictions(path, self.id_keys, self.text_keys, beside="answerable")

    def score_given(self, given: Matched, mode: str) -> Scores:
        scores = super().score_given(given, mode)
        said = [given.numbers.get(item.id) for item in given.items]
        if all(number is None for number in said):
            return scores
        known = [item.details if isinstance(item.details, int) else None for item in given.items]
        for what, values in (("predictions", said), ("references", known)):
            if without := sum(value is None for value in values):
                why = f"{without} of {len(values)} {what} hold no `answerable`"
                return replace(scores, notes={**scores.notes, "skipped": {"unanswerable": why}})
        measures = unanswerable(np.array(said, np.float64), np.array(known, np.float64))
        return replace(scores, measures=scores.measures | measures)

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        keys = (("question_id", int(i)) if i.isdecimal() else ("image", i) for i in answers)
        rows = [
            {key: name, "answer": self.submitted(text)}
            for (key, name), text in zip(keys, answers.values(), strict=True)
        ]
        return json.dumps(rows, ensure_ascii=False)


class PhotoReference(msgspec.Struct):
    image: str
    answers: list[Answer]
    answer_type: str | None = None
    answerable: int | None = None


class Photo(msgspec.Struct):
    image: str
    question: str
    answers: list[Answer] = []  # none in the test split
    answer_type: str | None = None
    answerable: int | None = None


class Named(msgspec.Struct):
    question_id: int | str
    image_id: int | str


def _photo(row: Photo | PhotoReference, question: str, image: Any) -> Item:
    texts = texts_of(row.answers) if row.answers or isinstance(row, PhotoReference) else ()
    groups = () if row.answer_type is None else (f"accuracy/{row.answer_type}",)
    return Item(row.image, question, texts, image, groups, row.answerable)


def official(answer: str, item: Item) -> float:
    """VizWiz's accuracy of one question, 0 to 1."""
    mine = process(clean(answer))
    return agreement(tuple(text == mine for text in item.references))


def unanswerable(said: Array, known: Array) -> dict[str, Measure]:
    """said: how answerable a prediction takes each question to be, 0 to 1; known: 1 or 0. [n]"""
    unsaid, wanted = 1 - said, 1 - known
    found = unsaid > 0.5
    # [n, 3]: true and false positives, false negatives
    table = np.column_stack([found * wanted, found * known, ~found * wanted])

    def f1(sums: Array) -> Array:
        return 100 * share(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])

    return {
        "unanswerable/average_precision": AveragePrecision(np.column_stack([unsaid, wanted]), scale=100),
        "unanswerable/f1": Measure(table, f1),
    }
