"""What a submission holds is what an evaluation scores: answers normalised as LLaVA's converters do, against a port of
their processor and of the official script; and which of the two figures `vlm score` says it has printed."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks.vizwiz import VizWiz
from data.benchmarks.vqa import BARE, SUBMITTED, VQA
from tests.data.benchmarks.files import annotation, score, write
from tests.data.benchmarks.official_vqa import Script
from tests.data.benchmarks.test_textvqa import M4C
from tests.data.benchmarks.test_vqa_official import question, text


def scripted(rows: list[dict[str, Any]], said: dict[str, str]) -> dict[str, float]:
    """The official script's score of each question. It overwrites what it's given."""
    results = [{"question_id": row["question_id"], "answer": said[str(row["question_id"])]} for row in rows]
    script = Script(copy.deepcopy(rows), results)
    script.evaluate()
    return {str(number): value for number, value in script.questions.items()}


@pytest.mark.parametrize("seed", range(2))
def test_an_evaluation_scores_its_submission(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [question(number, rng) for number in range(1500)]
    said = {str(row["question_id"]): rng.choice([rng.choice(row["answers"])["answer"], text(rng)]) for row in rows}
    said |= {name: answer.capitalize() + "." for name, answer in said.items() if rng.random() < 0.3}
    references = write(tmp_path / "annotations.json", {"annotations": rows})
    items = VQA().references(references)
    held = {name: M4C().process(answer) for name, answer in said.items()}
    submission = tmp_path / "predictions.json"
    submission.write_text(VQA().submission(items, said), encoding="utf-8")
    assert {str(row["question_id"]): row["answer"] for row in json.loads(submission.read_text())} == held
    scores = VQA().score_said(items, said)
    assert scores.per_item == scripted(rows, held)
    assert scores.scored == SUBMITTED
    assert scores.other is not None
    assert scores.other.scored == BARE
    assert scores.other.per_item == scripted(rows, said)
    assert abs(scores.metrics["accuracy"] - scores.other.metrics["accuracy"]) > 1
    # the file scores what the evaluation printed; the raw answers' file has both figures the other way round
    again = VQA().score_files(submission, references)
    assert (again.metrics, again.per_item) == (scores.metrics, scores.per_item)
    raw = write(tmp_path / "raw.json", [{"question_id": int(name), "answer": answer} for name, answer in said.items()])
    bare = VQA().score_files(raw, references)
    assert bare.per_item == scores.other.per_item
    assert bare.other is not None
    assert bare.other.metrics == pytest.approx(scores.metrics)
    assert VQA().score_said(items, said, "normalised").other is not None


def test_a_question_that_failed_is_wrong_in_both(tmp_path: Path) -> None:
    items = VQA().references(write(tmp_path / "a.json", {"annotations": [annotation(n, ["yes"] * 10) for n in (1, 2)]}))
    scores = VQA().score_said(items, {"1": "Yes", "2": None})
    assert scores.per_item == {"1": 100, "2": 0}
    assert scores.other is not None
    assert scores.other.per_item == {"1": 0, "2": 0}


def test_vizwiz_is_submitted_as_llava_does(tmp_path: Path) -> None:
    """Its converter sets 's apart and takes commas away, which VizWiz's program doesn't: "Joe's" becomes "joe 's"."""
    told = [[{"answer": text}] * 10 for text in ("joe's", "10 5", "105")]
    rows = [{"image": name, "answers": answers} for name, answers in zip("abc", told, strict=True)]
    items = VizWiz().references(write(tmp_path / "val.json", rows))
    said = {"a": "Joe's", "b": "10,x5", "c": "10,5"}
    scores = VizWiz().score_said(items, said)
    assert scores.per_item == {"a": 0, "b": 0, "c": 100}
    assert json.loads(VizWiz().submission(items, said)) == [
        {"image": "a", "answer": "joe 's"},
        {"image": "b", "answer": "10x5"},
        {"image": "c", "answer": "105"},
    ]
    assert scores.other is not None
    assert scores.other.per_item == {"a": 100, "b": 0, "c": 100}


ROWS = [annotation(n, ["yes"] * 10) for n in range(1, 1001)]


def said_yes(folder: Path, capitals: int) -> tuple[Path, Path]:
    """A thousand answers, some with a capital letter, which the bare script takes for wrong."""
    said = [{"question_id": n, "answer": "Yes" if n <= capitals else "yes"} for n in range(1, 1001)]
    return write(folder / "said.json", said), write(folder / "a.json", {"annotations": ROWS})


@pytest.mark.parametrize(("capitals", "told"), [(0, False), (1, False), (2, True), (1000, True)])
def test_score_says_which_it_printed_and_the_other_where_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], capitals: int, told: bool
) -> None:
    """More than .1, that is; one of a thousand is .1."""
    paths = said_yes(tmp_path, capitals)
    bare = 100 - capitals / 10
    _, out, _ = score(capsys, "vqav2", *paths, "--bootstrap", 0)
    lines = out.splitlines()
    assert lines[1] == "scored: answers as they were given (raw), by the official script alone"
    assert lines[2].split() == ["accuracy", f"{bare:.4f}"]
    other = "otherwise: accuracy 100.0000 of answers normalised as LLaVA submits them, by the official script"
    assert (other in lines) is told
    _, out, _ = score(capsys, "vqav2", *paths, "--bootstrap", 0, "--mode", "normalised")
    lines = out.splitlines()
    assert lines[1].startswith("scored: answers and references normalised always, one annotator left out by position")
    assert lines[2].split() == ["accuracy", "100.0000"]
    other = f"otherwise: accuracy {bare:.4f} of answers as they were given (raw), by the official script alone"
    assert (other in lines) is told
    _, out, _ = score(capsys, "vqav2", *paths, "--json", "--bootstrap", 0)
    found = json.loads(out)
    assert found["metrics"]["accuracy"] == pytest.approx(bare)
    assert found["mode"] == "official"
    assert found["scored"] == BARE
    assert found["other"]["scored"] == SUBMITTED
    assert found["other"]["metrics"] == {"accuracy": 100, "accuracy/other": 100, "question_type/what": 100}
    assert set(found) == {"task", "mode", "n", "metrics", "scored", "other"}
