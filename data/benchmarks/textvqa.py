"""TextVQA: questions about text in pictures (Singh et al. 2019), ten answers each."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from data.benchmarks.base import Answers, Benchmark, Item, averaged
from data.benchmarks.files import Files, array_name, read_array
from data.benchmarks.llava import Names, apart, told_apart
from data.benchmarks.predictions import Predictions, read_predictions, rename
from data.benchmarks.scores import Scores
from data.benchmarks.vqa import VQA, agreement
from data.benchmarks.vqa_text import evalai
from data.formats import SHORT_ANSWER


class TextVQA(Benchmark):
    """{"data": [{"question_id", "image_id", "question", "answers"}]}; predictions [{"question_id", "answer"}].

    The mean over annotators of min(agreeing others / 3, 1), answers as the challenge's server processes them (M4C's
    EvalAI processor). OCR tokens are not in the prompt. Files may be in VQA's form, too.
    """

    task = "textvqa"
    prompt = SHORT_ANSWER
    max_tokens = 16
    prompt_notes = {"ocr_tokens_in_prompt": False}

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        if data.is_file() and array_name(data, "data", "questions") == "questions":
            return _InVQAsForm().items(data, images, split)
        files = Files(data, split, "https://textvqa.org/dataset (0.5.1)")
        path = files.find("textvqa*.json", f"TextVQA_0.5.1_{split or 'val'}.json")
        files.check()
        pictures = files.pictures(images, ["train_images", "test_images", "images"])

        def ask(_: int, row: TextQuestion) -> Item:
            image = pictures.by_name(f"{row.image_id}.jpg", ["train_images", "test_images"])
            return Item(str(row.question_id), row.question, tuple(row.answers), image)

        return read_array(path, "data", TextQuestion, ask)

    def references(self, path: Path) -> list[Item]:
        if array_name(path, "data", "annotations") == "annotations":
            return _InVQAsForm().references(path)
        return read_array(
            path, "data", TextReference, lambda _, row: Item(str(row.question_id), "", tuple(row.answers))
        )

    def predictions(self, path: Path) -> Predictions:
        return read_predictions(path, self.id_keys, self.text_keys, rows=told_apart(path))

    def renamed(self, given: Predictions, items: Sequence[Item], references: Path) -> Predictions:
        """LLaVA's answers name the picture, of which there are several questions, and hold the prompt."""
        if not any("\n" in name for name in given.answers):
            return given
        rows = read_array(references, array_name(references, "data", "annotations"), Asked, lambda _, row: row)
        name = Names()
        known = {name(row.image_id, row.question): str(row.question_id) for row in rows}
        return rename(given, {item.id for item in items}, lambda said: known.get(said) or apart(said)[0])

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        values = [_text_accuracy(answers[item.id], item) for item in items]
        return averaged(self.task, mode, items, values, 100, **self.prompt_notes)


class _InVQAsForm(VQA):
    """TextVQA's questions and annotations as OpenFlamingo publishes them."""

    folders = ("train_images", "test_images")


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


class Asked(msgspec.Struct):
    question_id: int | str
    image_id: int | str = ""
    question: str = ""


def _text_accuracy(answer: str | None, item: Item) -> float:
    if answer is None:
        return 0.0
    mine = evalai(answer)
    return agreement(tuple(evalai(text) == mine for text in item.references))
