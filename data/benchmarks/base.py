"""The shape of a benchmark: items to ask, predictions to read and write, scores."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question. `references` are right answers; `kind` is what breakdowns go by; `details`: the official row."""

    id: str
    question: str
    references: tuple[str, ...]
    image: Path | None = None
    kind: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """metrics: name -> number; per_item: id -> number."""

    task: str
    mode: str
    metrics: dict[str, float]
    per_item: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.per_item)

    def as_json(self, per_item: bool) -> dict[str, Any]:
        shown: dict[str, Any] = {"task": self.task, "mode": self.mode, "n": self.n, "metrics": self.metrics}
        return {**shown, "per_item": self.per_item} if per_item else shown


class Benchmark(ABC):
    """A task by its name on the command line."""

    task: str
    prompt: str = "{question}"
    submission_name = "predictions.json"

    @abstractmethod
    def items(self, data: Path, images: Path | None) -> list[Item]:
        """The questions of a data file or folder, with their references where it holds any."""

    @abstractmethod
    def read_predictions(self, path: Path) -> dict[str, str]:
        """id -> answer, from a file in the benchmark's own submission format."""

    @abstractmethod
    def submission(self, answers: Mapping[str, str]) -> str:
        """The text of a file in the benchmark's own submission format."""

    @abstractmethod
    def references(self, path: Path) -> list[Item]:
        """What a references file says of each question; enough to score, not to ask."""

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Mapping[str, str], mode: str = "official") -> Scores:
        """Scores of one answer for every item."""

    def score_files(self, predictions: Path, references: Path, mode: str) -> Scores:
        """Scores of two files; UserError for unknown, missing or repeated ids."""
        items = self.references(references)
        answers = self.read_predictions(predictions)
        unique([(item.id, "") for item in items], references)
        match_ids(answers, [item.id for item in items], predictions, references)
        return self.score(items, answers, mode)


def match_ids(predicted: Mapping[str, str], wanted: Sequence[str], predictions: Path, references: Path) -> None:
    """Every wanted id has a prediction and nothing else does; UserError naming the first five that break it."""
    known = set(wanted)
    missing = [i for i in wanted if i not in predicted]
    extra = [i for i in predicted if i not in known]
    for ids, what in (
        (missing, f"no prediction in {predictions} for"),
        (extra, f"not asked in {references}, but predicted:"),
    ):
        if ids:
            raise UserError(f"{what} {len(ids)} questions: {', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''}")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


def unique(pairs: Sequence[tuple[str, str]], path: Path) -> dict[str, str]:
    """Pairs of id and answer as a mapping; UserError when an id comes twice."""
    answers = dict(pairs)
    if len(answers) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise UserError(f"{path}: {len(twice)} ids come twice, the first is {twice[0]}")
    return answers
