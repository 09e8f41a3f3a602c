"""VQA accuracy against a plain port of the official script, question by question and bit by bit."""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks.vqa import VQA
from tests.data.benchmarks.files import annotation, write
from tests.data.benchmarks.official_vqa import CONTRACTIONS, MARKS, NUMBERS, Script

REAL = os.environ.get("VLM_DEV_DATA", "")
WORDS = [
    *NUMBERS,
    *CONTRACTIONS,
    *"yes Yes YES no red Red blue 1,000 3.5 .5 U.S. a An the dog cat's 5:30 50% ÉTÉ".split(),
]
MANY = 3000


def text(rng: random.Random) -> str:
    """Words that the normaliser changes, with marks between, before and behind them."""
    out = rng.choice(["", "", "", " ", "\n"])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mark = rng.choice([*MARKS, ".", ". ", "'", "\t", "\n"]) if rng.random() < 0.3 else ""
        out += rng.choice(["", "", " "]) + mark + rng.choice(WORDS) + rng.choice(["", "", " ", mark])
    return out + ("." * rng.randint(1, 40) if rng.random() < 0.05 else "")


def question(number: int, rng: random.Random) -> dict[str, Any]:
    pool = [text(rng) for _ in range(rng.choice([1, 2, 2, 3, 5, 10]))]
    if rng.random() < 0.5:  # the same answer in other spellings
        pool += [pool[0].upper(), f"the {pool[0]}", f"{pool[0]}.", f" {pool[0]}\n"]
    alike = [pool[0]] * 10
    answers = alike if rng.random() < 0.2 else rng.choices(pool, k=rng.choice([10] * 8 + [1, 3]))
    row = annotation(number, answers, answer_type=rng.choice("abc"), question_type=rng.choice("xyz"))
    spoil = rng.random()
    for answer in row["answers"]:
        if spoil < 0.2:  # as in VizWiz
            del answer["answer_id"]
            answer["answer_confidence"] = rng.choice(["yes", "maybe"])
        elif spoil < 0.3:
            answer["answer_id"] = rng.choice([1, 2, 3])
        elif spoil < 0.35:
            answer["answer_id"] = None
    return row


@pytest.mark.parametrize("seed", range(3))
def test_every_question_scores_as_in_the_official_loop(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [question(number, rng) for number in range(MANY)]
    said = [
        {"question_id": row["question_id"], "answer": rng.choice([rng.choice(row["answers"])["answer"], text(rng)])}
        for row in rows
    ]
    script = Script(copy.deepcopy(rows), said)
    script.evaluate()
    references = write(tmp_path / "annotations.json", {"annotations": rows})
    scores = VQA().score_files(write(tmp_path / "said.json", said), references)
    assert scores.per_item == {str(number): value for number, value in script.questions.items()}  # equal, not nearly so
    assert len(set(scores.per_item.values())) > 10
    expected = {"accuracy": script.accuracy["overall"]}
    expected |= {f"accuracy/{name}": value for name, value in script.accuracy["answer_type"].items()}
    expected |= {f"question_type/{name}": value for name, value in script.accuracy["question_type"].items()}
    assert {name: round(value, 2) for name, value in scores.metrics.items()} == expected


def test_a_question_that_failed_is_wrong_and_counts(tmp_path: Path) -> None:
    rows = [annotation(1, ["red"] * 10), annotation(2, [""] * 10)]
    items = VQA().references(write(tmp_path / "annotations.json", {"annotations": rows}))
    scores = VQA().score(items, {"1": "red", "2": None})
    assert scores.per_item == {"1": 100, "2": 0}
    assert scores.metrics["accuracy"] == 50
    assert VQA().score(items, {"1": "red", "2": None}, "normalised").per_item == {"1": 100, "2": 0}
    # an empty answer isn't a failed one: the annotators may have said nothing, too
    assert VQA().score(items, {"1": "", "2": ""}).per_item == {"1": 0, "2": 100}


@pytest.mark.skipif(not REAL, reason="VLM_DEV_DATA names no folder with vqa-train100")
@pytest.mark.parametrize("predictions", ["mc_raw", "chatty", "annotator1"])
def test_every_published_question_scores_as_in_the_official_script(tmp_path: Path, predictions: str) -> None:
    folder = Path(REAL) / "vqa-train100"
    expected = json.loads((folder / "expected_official.json").read_text())[predictions]
    path = write(tmp_path / "predictions.json", expected["predictions"])
    scores = VQA().score_files(path, folder / "annotations.json", "official")
    assert scores.n == 100
    assert {key: round(value, 2) for key, value in scores.per_item.items()} == expected["per_question"]
    accuracy = expected["accuracy"]
    official = {"accuracy": accuracy["overall"]}
    official |= {f"accuracy/{name}": value for name, value in accuracy["perAnswerType"].items()}
    official |= {f"question_type/{name}": value for name, value in accuracy["perQuestionType"].items()}
    assert {key: round(value, 2) for key, value in scores.metrics.items()} == official
