"""VQA accuracy over ten human answers, as the official script computes it (Antol et al. 2015; VQA v2 evaluation)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from sys import intern
from typing import Any, ClassVar

import msgspec

from data.benchmarks.base import Answers, Benchmark, Item, averaged
from data.benchmarks.files import IMAGE_SETS, Files, image_sets, read_array
from data.benchmarks.scores import Scores
from data.benchmarks.vqa_text import clean, evalai, process
from data.formats import SHORT_ANSWER
from data.official import find_annotations
from data.records import IMAGE_SUFFIXES
from vlm.errors import UserError

# which answers were scored, and by which rule
BARE = "answers as they were given (raw), by the official script alone"
SUBMITTED = "answers normalised as LLaVA submits them, by the official script"
ALWAYS = "answers and references normalised always, one annotator left out by position"


class VQA(Benchmark):
    """Official questions and annotations files; `data` is the questions file or a folder that holds both.

    official: bit-equal to the script, which normalises nothing where all ten answers are the same; normalised: always
    normalises, and leaves one annotator out by position instead of by inequality. A submission holds normalised
    answers, as LLaVA's converter (convert_vqav2_for_submission.py) and so the published figures do.
    """

    task = "vqav2"
    prompt = SHORT_ANSWER
    modes = ("official", "normalised")
    max_tokens = 16
    folders: ClassVar[Sequence[str]] = ()  # where pictures may be, beside COCO's image sets

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, split, "https://visualqa.org/download.html")
        questions = files.find("*questions*.json", f"v2_OpenEnded_mscoco_{split or 'val2014'}_questions.json")
        files.check()
        annotations = beside(questions)
        known = {item.id: item for item in self.references(annotations)} if annotations else {}
        pictures = files.pictures(images, [*self.folders, *image_sets(questions)])

        def ask(index: int, row: Question) -> Item:
            told = known.get(str(row.question_id), Item(str(row.question_id), "", ()))
            name = str(row.image_id)
            named = Path(name).suffix.lower() in IMAGE_SUFFIXES  # as OpenFlamingo's file of VizWiz has them
            image = pictures.by_name(name, [*self.folders, *IMAGE_SETS]) if named else pictures.by_number(name)
            return replace(told, question=row.question, image=image)

        return read_array(questions, "questions", Question, ask)

    def references(self, path: Path) -> list[Item]:
        return read_array(path, "annotations", Annotation, lambda _, row: make_item(row))

    def accuracy(self, mode: str) -> Callable[[str, Item], float]:
        return official if mode == "official" else normalised

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        accuracy = self.accuracy(mode)
        values = [0.0 if (said := answers[item.id]) is None else accuracy(said, item) for item in items]
        notes = {}
        if accuracy is official and (alike := sum(item.details is not None for item in items)):
            notes["annotators_without_ids"] = (
                alike  # questions whose equal answers the script takes for one annotator's
            )
        scored = BARE if mode == "official" else ALWAYS
        return replace(averaged(self.task, mode, items, values, 100, **notes), scored=scored)

    def submitted(self, answer: str) -> str:
        return evalai(answer)

    def score_said(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        scores = super().score_said(items, answers, mode)
        scored = SUBMITTED if mode == "official" else scores.scored
        return replace(scores, scored=scored, other=self.score(items, answers, "official"))

    def other_score(self, items: Sequence[Item], answers: Answers, scores: Scores) -> Scores | None:
        """Of the bare script's score what it would be of normalised answers; of that of the other mode the script's."""
        if scores.mode != "official":
            return self.score(items, answers, "official")
        accuracy, values = self.accuracy("official"), list[float]()
        for item in items:
            said = answers[item.id] or ""
            held = self.submitted(said)
            values.append(scores.per_item[item.id] / 100 if held == said else accuracy(held, item))
        return replace(averaged(self.task, "official", items, values, 100), scored=SUBMITTED)


def beside(questions: Path) -> Path | None:
    """The annotations of a questions file; test questions are published without."""
    try:
        return find_annotations(questions)
    except UserError:
        return None


class Question(msgspec.Struct):
    question_id: int | str
    image_id: int | str
    question: str


class Annotation(msgspec.Struct):
    """Without types in files that OK-VQA's, TextVQA's and VizWiz's were made into: then there is no breakdown."""

    question_id: int | str
    answers: msgspec.Raw
    answer_type: str | None = None
    question_type: str | None = None


class Answer(msgspec.Struct, gc=False):
    answer: str
    answer_id: int | str | None = None


def make_item(row: Annotation) -> Item:
    kinds = (("accuracy", row.answer_type), ("question_type", row.question_type))
    groups = tuple([intern(f"{name}/{kind}") for name, kind in kinds if kind is not None])
    texts, objects = said(row.answers)
    return Item(str(row.question_id), "", texts, None, groups, objects)


_ANSWERS = msgspec.json.Decoder(list[Answer])


def said(answers: msgspec.Raw) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The annotators' answers, and what their objects hold beside them where that may be the same for two.

    The script takes equal objects for one annotator; None where each has an id of its own, as in VQAv2.
    """
    rows = _ANSWERS.decode(answers)
    texts = texts_of(rows)
    ids = {row.answer_id for row in rows}
    return texts, None if len(ids) == len(rows) and None not in ids else objects(msgspec.json.decode(answers))


def texts_of(rows: Sequence[Answer]) -> tuple[str, ...]:
    if not rows:
        raise ValueError("no answers")
    return tuple([intern(row.answer) for row in rows])  # ten million characters of `yes` take room once


def objects(answers: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """What each answer's object holds beside the answer, as text; None where all of them differ by it."""
    rest = ({key: value for key, value in answer.items() if key != "answer"} for answer in answers)
    texts = tuple(json.dumps(one, sort_keys=True) for one in rest)
    return texts if len(set(texts)) < len(texts) else None


def official(answer: str, item: Item) -> float:
    """VQA accuracy of one question, 0 to 1, with the script's quirks."""
    answer, processed = _forms(answer)
    forms = list(map(_forms, item.references))
    others = [form[0] for form in forms]
    if others.count(others[0]) < len(others):
        answer, others = processed, [form[1] for form in forms]
    if item.details is None:
        return agreement(tuple([other == answer for other in others]))
    keys = list(zip(others, item.details, strict=True))
    hits = [sum(other == answer and key != mine for other, key in zip(others, keys, strict=True)) for mine in keys]
    return sum(min(1.0, hit / 3) for hit in hits) / len(hits)


def normalised(answer: str, item: Item) -> float:
    answer = _forms(answer)[1]
    return agreement(tuple(_forms(text)[1] == answer for text in item.references))


@lru_cache(1 << 16)
def agreement(hits: tuple[bool, ...]) -> float:
    """The mean over annotators of min(agreeing others / 3, 1)."""
    total = sum(hits)
    return sum(min(1.0, (total - hit) / 3) for hit in hits) / len(hits)


@lru_cache(1 << 18)
def _forms(text: str) -> tuple[str, str]:
    """An answer as it is compared where all ten agree, and where they don't; the same few answers come again."""
    cleaned = clean(text)
    return cleaned, process(cleaned)
