"""The shape of a benchmark: what is asked, in which words, and how the answers are scored."""

import gc
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from data.benchmarks.measures import mean
from data.benchmarks.predictions import LeftOut, Predictions, match, read_predictions, unique
from data.benchmarks.scores import Scores
from data.pictures import ImageRef
from data.records import Message
from vlm.errors import UserError

Answers = Mapping[str, str | None]  # None: the question could not be asked, which is scored as wrong


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that is more than a text with a picture before it: messages up to the user's that is to be answered,
    with image parts where `images` stand, in order."""

    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """One question. references: right answers; groups: the names of the breakdowns that it counts for, such as
    "accuracy/number"; details: what the scoring needs besides; asked: the whole of it, where it is more than `question`
    with `image` (the first one) before it."""

    id: str
    question: str
    references: tuple[str, ...]
    image: ImageRef | None = None
    groups: tuple[str, ...] = ()
    details: Any = None
    asked: Asked | None = None

    @property
    def images(self) -> tuple[ImageRef, ...]:
        if self.asked is not None:
            return self.asked.images
        return () if self.image is None else (self.image,)


@dataclass(frozen=True)
class Matched:
    """Questions that have a prediction, and these; numbers: what a file of predictions holds besides for some."""

    items: list[Item]
    answers: dict[str, str]
    left_out: LeftOut
    numbers: Mapping[str, float]


class Benchmark(ABC):
    """A task by its name on the command line. `prompt` and `max_tokens` are those that LLaVA-1.5 was published with."""

    task: ClassVar[str]
    prompt: ClassVar[str] = "{question}"
    max_tokens: ClassVar[int] = 32
    modes: ClassVar[tuple[str, ...]] = ("official",)
    submission_name: ClassVar[str] = "predictions.json"
    running: ClassVar[str] = "accuracy"  # the metric to be shown while answers come in; "": none can be
    id_keys: ClassVar[tuple[str, ...]] = ("question_id", "id")  # `id` as in the answers.jsonl of an evaluation
    text_keys: ClassVar[tuple[str, ...]] = ("answer", "text")  # LLaVA's raw answers call them text
    prompt_notes: ClassVar[Mapping[str, Any]] = {}  # among the notes of a score of answers to `prompt`
    ordered: ClassVar[bool] = False  # predictions may be without ids, in the order of the questions

    @abstractmethod
    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        """The questions of a data file or folder, with their references where it holds any."""

    @abstractmethod
    def references(self, path: Path) -> list[Item]:
        """What a file of references says of each question; enough to score, not to ask. Without references it isn't
        scored."""

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        """Scores of one answer for every item."""

    def predictions(self, path: Path) -> Predictions:
        """id -> answer, from a file in the benchmark's own submission format."""
        return read_predictions(path, self.id_keys, self.text_keys, self.ordered)

    def submitted(self, answer: str) -> str:
        """What a submission holds of a model's answer."""
        return answer

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        """The text of a file in the benchmark's own submission format: of each item what is submitted of its answer."""
        rows = [
            {self.id_keys[0]: as_number(i), self.text_keys[0]: self.submitted(answer)} for i, answer in answers.items()
        ]
        return json.dumps(rows, ensure_ascii=False)

    def score_said(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        """Scores of what a submission holds of a model's answers."""
        held = {name: None if text is None else self.submitted(text) for name, text in answers.items()}
        return self.score(items, held, mode)

    def other_score(self, items: Sequence[Item], answers: Answers, scores: Scores) -> Scores | None:
        """Of answers from a file, which have `scores`: those that people may mean as well, by another rule."""
        return None

    def demonstrated(self, item: Item) -> str:
        """The answer that a demonstration of few-shot prompts gives: what most people said."""
        return max(item.references, key=item.references.count)

    def choices(self, item: Item) -> tuple[str, ...]:
        """The answers among which the likeliest may be taken, for tasks that give some."""
        return ()

    def wrong(self, item: Item) -> str:
        """What a file of predictions holds for a question that could not be asked."""
        return ""

    def name_columns(self, columns: Iterable[str]) -> None:
        """Keys of rows that have other names: NAME=KEY."""
        raise UserError(f"--columns is for exact; {self.task} has files of its own form")

    def check_mode(self, mode: str) -> None:
        if mode not in self.modes:
            raise UserError(f"{self.task} is scored in the mode {' or '.join(self.modes)}, not {mode}")

    def of_interest(self, items: list[Item], given: Predictions, references: Path) -> list[Item]:
        """The items that a file of predictions has to answer."""
        return items

    def renamed(self, given: Predictions, items: Sequence[Item], references: Path) -> Predictions:
        """Predictions under the items' ids, where people's files name the questions otherwise."""
        return given

    def matched(self, predictions: Path, references: Path, allow_partial: bool = False) -> Matched:
        """The scored questions that have a prediction, and these; UserError for whatever doesn't fit (`match`)."""
        with collector_paused():
            items, given = self.references(references), self.predictions(predictions)
        unique([item.id for item in items], references)
        given = self.renamed(given, items, references)
        items = self.of_interest(items, given, references)
        unscored = {item.id for item in items if not item.references}
        items = [item for item in items if item.references]
        if not items:
            raise UserError(f"{references}: {len(unscored)} questions, none of which is scored")
        answers, left_out = match(given, [item.id for item in items], references, allow_partial, unscored)
        return Matched([item for item in items if item.id in answers], answers, left_out, given.numbers)

    def score_files(
        self, predictions: Path, references: Path, mode: str = "official", allow_partial: bool = False
    ) -> Scores:
        self.check_mode(mode)
        return self.score_given(self.matched(predictions, references, allow_partial), mode)

    def score_given(self, given: Matched, mode: str) -> Scores:
        """Scores of answers from a file, of whose prompt nothing is known."""
        scores = self.score(given.items, given.answers, mode)
        for name in self.prompt_notes:
            scores.notes.pop(name)
        scores.notes.update(given.left_out.as_notes())
        return replace(scores, other=self.other_score(given.items, given.answers, scores))


@contextmanager
def collector_paused() -> Iterator[None]:
    """While many objects are made of which none is garbage, the collector would look through them again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def as_number(name: str) -> int | str:
    """Ids are numbers where they were, as evaluation servers want them; of more than 18 digits they stay text."""
    return int(name) if len(name) <= 18 and name.isdecimal() and str(int(name)) == name else name


def averaged(
    task: str, mode: str, items: Sequence[Item], values: Sequence[float], scale: float = 1.0, **notes: Any
) -> Scores:
    """The mean over all items as "accuracy", and over each of their groups; all times `scale`."""
    members: dict[str, list[float]] = {"accuracy": list(values)}
    for item, value in zip(items, values, strict=True):
        for group in item.groups:
            members.setdefault(group, []).append(value)
    measures = {name: mean(some, scale) for name, some in members.items()}
    per_item = {item.id: value * scale for item, value in zip(items, values, strict=True)}
    return Scores(task, mode, measures, per_item, notes)
