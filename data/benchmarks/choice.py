"""Multiple choice: ScienceQA (Lu et al. 2022), asked and read as LLaVA does."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import msgspec

from data.benchmarks.base import Answers, Benchmark, Item, averaged
from data.benchmarks.files import Files, read_object
from data.benchmarks.letters import read_letter
from data.benchmarks.predictions import Predictions, read_predictions, read_text
from data.benchmarks.scores import Scores
from vlm.errors import UserError


class ScienceQA(Benchmark):
    """problems.json {id: {"question", "choices", "answer", "hint", "image", "split"}}, pictures as SPLIT/ID/image.png.

    Predictions: JSON lines {"question_id", "text"}, or what the scripts of LLaVA and ScienceQA write: {"outputs":
    {id: text}}, {"results": {id: number of the choice}}, {"correct": [{"question_id", "pred"}], "incorrect"}. A letter
    is read from each answer; answers without one are wrong, and listed.
    """

    task = "scienceqa"
    prompt = "{question}\nAnswer with the option's letter from the given choices directly."
    max_tokens = 16
    text_keys = ("answer", "text", "prediction", "pred")

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, None, "https://github.com/lupantech/ScienceQA (data/scienceqa)")
        path = files.find("*problems*.json", "problems.json")
        files.check()
        wanted = split or "test"
        pictures = files.pictures(images, ["images"])

        def ask(key: str, row: Problem) -> Item | None:
            if row.split is not None and row.split != wanted:
                return None
            image = pictures.by_name(f"{key}/{row.image}", [wanted]) if row.image else None
            return make_item(key, row, image)

        items = [item for item in read_object(path, Problem, ask) if item is not None]
        if not items:
            raise UserError(f"{path}: no problem is of the split {wanted!r} (theirs are train, val and test)")
        return items

    def references(self, path: Path) -> list[Item]:
        return read_object(path, Problem, lambda key, row: make_item(key, row, None))

    def of_interest(self, items: list[Item], given: Predictions, references: Path) -> list[Item]:
        """All splits are in one file; those that no prediction is of aren't asked for."""
        splits = dict(read_object(references, Split, lambda key, row: (key, row.split)))
        answered = {splits[name] for name in given.answers if name in splits}
        return [item for item in items if splits[item.id] in answered] or items

    def predictions(self, path: Path) -> Predictions:
        text = read_text(path)
        try:
            whole = json.loads(text, object_pairs_hook=_Object)
        except (ValueError, RecursionError):  # JSON lines
            whole = None
        if not isinstance(whole, dict):
            return read_predictions(path, self.id_keys, self.text_keys)
        if all(isinstance(whole.get(name), list) for name in ("correct", "incorrect")):
            rows = [(f"{name}[{at}]", row) for name in ("correct", "incorrect") for at, row in enumerate(whole[name])]
            return read_predictions(path, self.id_keys, ("pred",), rows=rows)
        # the texts, where a file has both
        given = next((name for name in ("outputs", "results") if isinstance(whole.get(name), dict)), None)
        if given is None:
            return read_predictions(path, self.id_keys, self.text_keys)
        found = Predictions(path, repeated=whole[given].repeated)
        for name, answer in whole[given].items():
            said = _numbered(answer) if given == "results" else answer
            if isinstance(said, str):
                found.answers[name] = said
            else:
                needed = "the number of a choice" if given == "results" else "text"
                found.broken.append(f"{given}[{name}]: {needed} is needed, not {repr(answer)[:40]}")
        return found

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        return json.dumps({"outputs": dict(answers)}, ensure_ascii=False)

    def choices(self, item: Item) -> tuple[str, ...]:
        return tuple(ascii_uppercase[: len(item.details)])

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        read = [read_letter(answers[item.id] or "", item.details) for item in items]
        right = [float(letter == item.references[0]) for letter, item in zip(read, items, strict=True)]
        unparsed = [
            {"id": item.id, "answer": answers[item.id]}
            for letter, item in zip(read, items, strict=True)
            if letter is None and answers[item.id] is not None
        ]
        return averaged(self.task, mode, items, right, unparsed=len(unparsed), unparsed_answers=unparsed)


def _numbered(choice: Any) -> str | None:
    """The letter of a choice by its number from 0; -1 stands for an answer that no letter was read from."""
    if not isinstance(choice, int) or isinstance(choice, bool) or not -1 <= choice < len(ascii_uppercase):
        return None
    return ascii_uppercase[choice] if choice >= 0 else ""


class _Object(dict[str, Any]):
    """The first value of each key of a JSON object, and the keys that come again."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        self.repeated: list[str] = []
        for name, value in pairs:
            if name in self:
                self.repeated.append(name)
            else:
                self[name] = value


class Split(msgspec.Struct):
    split: str | None = None


class Problem(msgspec.Struct):
    question: str
    choices: list[str]
    answer: int
    hint: str = ""
    image: str | None = None
    split: str | None = None
    subject: str | None = None
    grade: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(ascii_uppercase):
            raise ValueError(f"{len(self.choices)} choices")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices")


def make_item(key: str, row: Problem, image: Any) -> Item:
    letters = ascii_uppercase[: len(row.choices)]
    options = (f"{letter}. {choice}" for letter, choice in zip(letters, row.choices, strict=True))
    question = "\n".join([*([f"Context: {row.hint}"] if row.hint else []), row.question, *options])
    groups = [f"subject/{row.subject}"] if row.subject else []
    groups += [f"grade/{row.grade}"] if row.grade else []
    groups.append("accuracy/image" if row.image else "accuracy/no image")
    return Item(key, question, (letters[row.answer],), image, tuple(groups), tuple(row.choices))
