"""POPE: is an object in the picture? (Li et al. 2023)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.benchmarks.base import Answers, Benchmark, Item, as_number
from data.benchmarks.files import Files, image_sets
from data.benchmarks.llava import apart, told_apart
from data.benchmarks.measures import Array, Measure, mean, share
from data.benchmarks.predictions import Predictions, as_id, json_rows, listed, read_predictions, rename
from data.benchmarks.scores import Scores
from data.formats import SHORT_ANSWER
from vlm.errors import UserError

NEGATIVE = {"No", "not", "no"}


class POPE(Benchmark):
    """JSON lines {"question_id", "image", "text", "label"}; predictions {"question_id", "answer"}, or in the order of
    the questions. "yes" is what is looked for."""

    task = "pope"
    prompt = SHORT_ANSWER
    max_tokens = 16
    submission_name = "predictions.jsonl"
    text_keys = ("answer", "text")
    ordered = True

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, split, "https://github.com/AoiDragon/POPE (output/coco), with COCO's val2014 pictures")
        path = files.find("*pope*.json*", f"coco_pope_{split or 'random'}.json")
        files.check()
        pictures = files.pictures(images, ["val2014", *image_sets(path)])
        return [
            Item(name, question, (label,), pictures.by_name(image))
            for name, question, label, image in self._rows(path, asked=True)
        ]

    def references(self, path: Path) -> list[Item]:
        return [Item(name, "", (label,)) for name, _, label, _ in self._rows(path, asked=False)]

    def predictions(self, path: Path) -> Predictions:
        return read_predictions(path, self.id_keys, self.text_keys, self.ordered, told_apart(path))

    def renamed(self, given: Predictions, items: Sequence[Item], references: Path) -> Predictions:
        """LLaVA numbers the questions of all three files in one, and its script takes those of each in their order:
        where ids don't fit, the place counts at which a file's questions stand in a row among the prompts."""
        said = [apart(name) for name in given.answers]
        if given.ordered or not any("\n" in name for name in given.answers):
            return given
        names = dict(zip(given.answers, (known for known, _ in said), strict=True))
        if set(names.values()) != {item.id for item in items}:
            texts = [text.strip().lower() for _, text, _, _ in self._rows(references, asked=False)]
            questions = [question for _, question in said]
            starts = (at for at in range(len(said)) if questions[at : at + len(texts)] == texts)
            if all(texts) and (start := next(starts, None)) is not None:
                names = {name: f"{known} of other questions" for name, known in names.items()}
                own = list(given.answers)[start : start + len(texts)]
                names |= dict(zip(own, (item.id for item in items), strict=True))
        return rename(given, (), names.get)

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        rows = ({"question_id": as_number(i), "answer": text} for i, text in answers.items())
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def wrong(self, item: Item) -> str:
        """An empty answer would be read as yes."""
        return "yes" if item.references and item.references[0] == "no" else "no"

    def choices(self, item: Item) -> tuple[str, ...]:
        return ("Yes", "No")

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        truth = np.array([item.references[0] != "no" for item in items])
        said = [answers[item.id] for item in items]
        yes = np.array([~right if text is None else says_yes(text) for right, text in zip(truth, said, strict=True)])
        # [n, 5]: true and false positives, false and true negatives, and 1
        table = np.column_stack([yes & truth, yes & ~truth, ~yes & truth, ~yes & ~truth, np.ones_like(yes)])
        statistics = table.astype(np.float64)

        def precision(sums: Array) -> Array:
            return share(sums[..., 0], sums[..., 0] + sums[..., 1])

        def recall(sums: Array) -> Array:
            return share(sums[..., 0], sums[..., 0] + sums[..., 2])

        def f1(sums: Array) -> Array:
            return share(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])

        right = (yes == truth).astype(np.float64)
        measures = {
            "accuracy": mean(right),
            "precision": Measure(statistics, precision),
            "recall": Measure(statistics, recall),
            "f1": Measure(statistics, f1),
            "yes_ratio": mean(yes),
        }
        per_item = {item.id: float(value) for item, value in zip(items, right, strict=True)}
        return Scores(self.task, mode, measures, per_item)

    def _rows(self, path: Path, asked: bool) -> list[tuple[str, str, str, str]]:
        """id, question, label and image of each row; ids are row numbers where there are none."""
        found, broken = [], list[str]()
        needed = ("text", "image", "label") if asked else ("label",)
        for number, (where, row) in enumerate(json_rows(path)):
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in needed):
                broken.append(f"{where}: {', '.join(needed)} are needed, which are text")
            elif (name := as_id(row.get("question_id", number))) is None or row["label"] not in ("yes", "no"):
                broken.append(f"{where}: question_id {row.get('question_id')!r}, label {row['label']!r} (yes or no)")
            else:
                found.append((name, row.get("text", ""), row["label"], row.get("image", "")))
        if broken:
            raise UserError(f"{path}: {len(broken)} rows can't be read ({listed(broken)})")
        return found


def says_yes(answer: str) -> bool:
    """As the official script reads it: of the first sentence, without commas, a word that is No, not or no."""
    return NEGATIVE.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))
