"""Plain question-and-answer benchmarks, and `vlm score` on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.benchmarks import BENCHMARKS, find_benchmark
from data.benchmarks.exact import Exact
from vlm import UserError
from vlm.cli import main

QUESTIONS = [
    {"id": "q1", "image": "a.png", "question": "what colour?", "answer": "red", "kind": "colour"},
    {"id": "q2", "image": "a.png", "question": "what shape?", "answer": "Cube", "kind": "shape"},
    {"id": "q3", "image": "a.png", "question": "which colour?", "answer": "blue", "kind": "colour"},
    {"id": "q4", "question": "sure?", "answer": "yes"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def files(tmp_path: Path, answers: dict[str, str]) -> tuple[Path, Path]:
    predictions = write(tmp_path / "predictions.jsonl", [{"id": i, "answer": a} for i, a in answers.items()])
    return predictions, write(tmp_path / "questions.jsonl", QUESTIONS)


SAID = {"q1": " red\n", "q2": "cube.", "q3": "red", "q4": "Yes."}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("official", {"accuracy": 0.25, "accuracy/colour": 0.5, "accuracy/shape": 0.0}),
        ("normalised", {"accuracy": 0.75, "accuracy/colour": 0.5, "accuracy/shape": 1.0}),
    ],
)
def test_answers_are_right_when_they_equal_the_reference(tmp_path: Path, mode: str, expected: dict[str, float]) -> None:
    scores = Exact().score_files(*files(tmp_path, SAID), mode)
    assert scores.metrics == expected
    assert (scores.n, scores.mode, scores.task) == (4, mode, "exact")
    right = {"q1"} if mode == "official" else {"q1", "q2", "q4"}
    assert {i for i, score in scores.per_item.items() if score} == right


def test_items_have_their_pictures_ids_and_kinds(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    items = Exact().items(write(tmp_path / "questions.jsonl", QUESTIONS), None)
    assert [item.id for item in items] == ["q1", "q2", "q3", "q4"]
    assert [item.image for item in items] == [(tmp_path / "a.png").resolve()] * 3 + [None]
    assert [item.kind for item in items] == ["colour", "shape", "colour", None]
    assert [item.references for item in items] == [("red",), ("Cube",), ("blue",), ("yes",)]
    bare = [{"question": "what?", "answer": "x"}, {"question": "who?", "answer": "y", "question_id": 9}]
    assert [item.id for item in Exact().items(write(tmp_path / "bare.jsonl", bare), None)] == ["0", "9"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "what?"}, r"questions\.jsonl:2: a row needs an answer, which is text"),
        ({"question": "what?", "answer": 3}, r"questions\.jsonl:2: a row needs an answer, which is text"),
        ({"answer": "red"}, r"questions\.jsonl:2: a row needs a question, which is text"),
        ({"question": "what?", "answer": "red", "image": "../a.png"}, r"questions\.jsonl:2: .* lies outside"),
        ({"question": "what?", "answer": "red", "image": "none.png"}, r"questions\.jsonl:2: .* is not in"),
    ],
)
def test_bad_questions_are_named_by_their_line(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    path = write(tmp_path / "questions.jsonl", [QUESTIONS[3], row])
    with pytest.raises(UserError, match=complaint):
        Exact().items(path, None)


def test_ids_that_are_missing_unknown_or_repeated_are_named(tmp_path: Path) -> None:
    missing = {key: SAID[key] for key in ("q1", "q3")}
    with pytest.raises(UserError, match=r"no prediction in .*predictions\.jsonl for 2 questions: q2, q4"):
        Exact().score_files(*files(tmp_path, missing), "official")
    with pytest.raises(UserError, match=r"not asked in .*questions\.jsonl, but predicted: 1 questions: q9"):
        Exact().score_files(*files(tmp_path, {**SAID, "q9": "red"}), "official")
    predictions, questions = files(tmp_path, SAID)
    predictions.write_text(predictions.read_text() + '{"id": "q3", "answer": "blue"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl: 1 ids come twice, the first is q3"):
        Exact().score_files(predictions, questions, "official")
    predictions, questions = files(tmp_path, SAID)
    questions.write_text(questions.read_text() + json.dumps(QUESTIONS[1]) + "\n")
    with pytest.raises(UserError, match=r"questions\.jsonl: 1 ids come twice, the first is q2"):
        Exact().score_files(predictions, questions, "official")


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"q1": "red", "q2": "it's ü\n", "7": ""}
    path = tmp_path / "predictions.jsonl"
    path.write_text(Exact().submission(answers), encoding="utf-8")
    assert Exact().read_predictions(path) == answers


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    assert {type(find_benchmark(task)) for task in BENCHMARKS} == set(BENCHMARKS.values())
    with pytest.raises(UserError, match="unknown task 'vqa'; there are exact, vqav2"):
        find_benchmark("vqa")


def score(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["score", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_json_is_printed_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, questions = files(tmp_path, SAID)
    code, out, err = score(capsys, "exact", predictions, questions, "--json")
    assert (code, err) == (0, "")
    metrics = {"accuracy": 0.25, "accuracy/colour": 0.5, "accuracy/shape": 0.0}
    assert json.loads(out) == {"task": "exact", "mode": "official", "n": 4, "metrics": metrics}
    options = ("--json", "--per-item", "--mode", "normalised")
    code, out, err = score(capsys, "exact", predictions, questions, *options)
    told = json.loads(out)
    assert (code, err, told["mode"]) == (0, "", "normalised")
    assert told["per_item"] == {"q1": 1.0, "q2": 1.0, "q3": 0.0, "q4": 1.0}


def test_people_are_told_the_task_the_mode_and_the_number_of_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = score(capsys, "exact", *files(tmp_path, SAID))
    assert code == 0
    assert out.splitlines()[0] == "exact, mode official, n = 4"
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["accuracy", "0.2500"],
        ["accuracy/colour", "0.5000"],
        ["accuracy/shape", "0.0000"],
    ]


@pytest.mark.parametrize(
    ("task", "spoil", "complaint"),
    [
        ("exakt", None, "unknown task 'exakt'"),
        ("exact", "none", "no such data file"),
        ("exact", "{", "not valid JSON"),
        ("exact", "", "no rows in it"),
        ("vqav2", "none", "no such file"),
        ("vqav2", "{", "not a JSON file"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, spoil: str | None, complaint: str
) -> None:
    predictions, questions = files(tmp_path, SAID)
    if task == "vqav2":
        questions.write_text(json.dumps({"annotations": [ANNOTATION]}))
    if spoil == "none":
        predictions.unlink()
    elif spoil is not None:
        predictions.write_text(spoil)
    code, out, err = score(capsys, task, predictions, questions, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("vlm score: ")
    assert complaint in err
    assert len(err.splitlines()) == 1


ANNOTATION = {
    "question_id": 1,
    "image_id": 1,
    "answers": [{"answer": "red", "answer_id": n} for n in range(10)],
    "answer_type": "other",
    "question_type": "what",
}
