"""VizWiz: questions of blind people about their photographs (Gurari et al. 2018), ten answers each."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from data.benchmarks.base import Item
from data.benchmarks.files import Files, holds_object, read_array
from data.benchmarks.predictions import Predictions, number_in_name, rename
from data.benchmarks.vqa import VQA, Answer, agreement, normalised, texts_of
from data.benchmarks.vqa_text import clean, process


class VizWiz(VQA):
    """[{"image", "question", "answers", "answer_type"}], or VQA's two files; predictions [{"image", "answer"}].

    official: VizWiz's own program, which always normalises the prediction, never the annotators' answers, and leaves
    one annotator out by position; normalised: normalises those, too. The published program's contractions have
    typographic apostrophes, so that most can match nothing; VQA's are used. Submissions are as LLaVA's.
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


class Photo(msgspec.Struct):
    image: str
    question: str
    answers: list[Answer] = []  # none in the test split
    answer_type: str | None = None


class Named(msgspec.Struct):
    question_id: int | str
    image_id: int | str


def _photo(row: Photo | PhotoReference, question: str, image: Any) -> Item:
    texts = texts_of(row.answers) if row.answers or isinstance(row, PhotoReference) else ()
    groups = () if row.answer_type is None else (f"accuracy/{row.answer_type}",)
    return Item(row.image, question, texts, image, groups)


def official(answer: str, item: Item) -> float:
    """VizWiz's accuracy of one question, 0 to 1."""
    mine = process(clean(answer))
    return agreement(tuple(text == mine for text in item.references))
