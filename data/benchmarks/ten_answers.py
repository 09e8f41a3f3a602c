"""TextVQA and VizWiz: ten answers a question, as in VQA, in files and with rules of their own."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from data.benchmarks.base import Answers, Benchmark, Item, averaged
from data.benchmarks.files import Files, read_array
from data.benchmarks.scores import Scores
from data.benchmarks.vqa import VQA, agreement, said
from data.benchmarks.vqa_text import clean, process
from data.formats import SHORT_ANSWER


class TextVQA(Benchmark):
    """{"data": [{"question_id", "image_id", "question", "answers"}]}; predictions [{"question_id", "answer"}].

    The mean over annotators of min(agreeing others / 3, 1), answers as the challenge's server processes them (M4C's
    EvalAI processor). OCR tokens are not in the prompt.
    """

    task = "textvqa"
    prompt = SHORT_ANSWER
    max_tokens = 16
    prompt_notes = {"ocr_tokens_in_prompt": False}

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, split, "https://textvqa.org/dataset (0.5.1)")
        path = files.find("textvqa*.json", f"TextVQA_0.5.1_{split or 'val'}.json")
        files.check()
        pictures = files.pictures(images, ["train_images", "test_images", "images"])

        def ask(_: int, row: TextQuestion) -> Item:
            image = pictures.by_name(f"{row.image_id}.jpg", ["train_images", "test_images"])
            return Item(str(row.question_id), row.question, tuple(row.answers), image)

        return read_array(path, "data", TextQuestion, ask)

    def references(self, path: Path) -> list[Item]:
        return read_array(
            path, "data", TextReference, lambda _, row: Item(str(row.question_id), "", tuple(row.answers))
        )

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        values = [_text_accuracy(answers[item.id], item) for item in items]
        return averaged(self.task, mode, items, values, 100, **self.prompt_notes)


class TextReference(msgspec.Struct):
    question_id: int | str
    answers: list[str]

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("no answers")


class TextQuestion(msgspec.Struct):
    question_id: int | str
    image_id: str
    question: str
    answers: list[str] = []


class VizWiz(VQA):
    """[{"image", "question", "answers", "answer_type"}]; predictions [{"image", "answer"}]: images are the ids."""

    task = "vizwiz"
    prompt = (
        "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    id_keys = ("image", "question_id")

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, split, "https://vizwiz.org/tasks-and-datasets/vqa/")
        path = files.find("*.json", f"{split or 'val'}.json")
        files.check()
        pictures = files.pictures(images, [path.stem, "val", "test", "train", "images"])

        def ask(_: int, row: Photo) -> Item:
            image = pictures.by_name(row.image, ["val", "test", "train"])
            return _photo(row, row.question, image)

        return read_array(path, None, Photo, ask)

    def references(self, path: Path) -> list[Item]:
        return read_array(path, None, PhotoReference, lambda _, row: _photo(row, "", None))

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        return json.dumps([{"image": i, "answer": text} for i, text in answers.items()], ensure_ascii=False)


class PhotoReference(msgspec.Struct):
    image: str
    answers: msgspec.Raw
    answer_type: str = "other"


class Photo(msgspec.Struct):
    image: str
    question: str
    answers: msgspec.Raw = msgspec.Raw()
    answer_type: str = "other"


def _photo(row: "Photo | PhotoReference", question: str, image: Any) -> Item:
    texts, objects = said(row.answers) if bytes(row.answers) else ((), None)
    return Item(row.image, question, texts, image, (f"accuracy/{row.answer_type}",), objects)


def _text_accuracy(answer: str | None, item: Item) -> float:
    if answer is None:
        return 0.0
    mine = evalai(answer)
    return agreement(tuple(evalai(text) == mine for text in item.references))


@lru_cache(1 << 18)
def evalai(text: str) -> str:
    """An answer as the EvalAI server processes it: commas, question marks and ' before s go first."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return process(clean(words))
