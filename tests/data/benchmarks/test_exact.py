"""Plain question-and-answer rows, which anybody may write."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.benchmarks import BENCHMARKS, find_benchmark
from data.benchmarks.exact import Exact
from data.benchmarks.files import check_pictures
from tests.data.benchmarks.files import write_lines
from vlm import UserError
from vlm.cli import main

QUESTIONS = [
    {"id": "q1", "image": "a.png", "question": "what colour?", "answer": "red", "kind": "colour"},
    {"id": "q2", "image": "a.png", "question": "what shape?", "answer": "Cube", "kind": "shape"},
    {"id": "q3", "image": "a.png", "question": "which colour?", "answer": "blue", "kind": "colour"},
    {"id": "q4", "question": "sure?", "answer": "yes"},
]


def files(tmp_path: Path, answers: dict[str, str]) -> tuple[Path, Path]:
    predictions = write_lines(tmp_path / "predictions.jsonl", [{"id": i, "answer": a} for i, a in answers.items()])
    return predictions, write_lines(tmp_path / "questions.jsonl", QUESTIONS)


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
    items = Exact().items(write_lines(tmp_path / "questions.jsonl", QUESTIONS), None)
    assert [item.id for item in items] == ["q1", "q2", "q3", "q4"]
    assert [item.image for item in items] == [(tmp_path / "a.png").resolve()] * 3 + [None]
    assert [item.groups for item in items] == [("accuracy/colour",), ("accuracy/shape",), ("accuracy/colour",), ()]
    assert [item.references for item in items] == [("red",), ("Cube",), ("blue",), ("yes",)]
    bare = [{"question": "what?", "answer": "x"}, {"question": "who?", "answer": "y", "question_id": 9}]
    assert [item.id for item in Exact().items(write_lines(tmp_path / "bare.jsonl", bare), None)] == ["0", "9"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "what?"}, r"questions\.jsonl:2: a question without an answer \(keys: question\)"),
        ({"question": "what?", "answer": {"x": 3}}, r"questions\.jsonl:2: answer must be a text, not an object"),
        ({"answer": "red"}, r"questions\.jsonl:2: unknown kind of row \(keys: answer\)"),
        ({"texts": ["x", None], "images": [None, "a.png"]}, r"questions\.jsonl:2: a document, which has no question"),
        ({"question": "what?", "answer": "red", "image": "../a.png"}, r"questions\.jsonl:2: .* lies outside"),
        ({"question": "what?", "answer": "red", "image": "none.png"}, r"questions\.jsonl:2: .* is not in"),
    ],
)
def test_bad_questions_are_named_by_their_line(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    path = write_lines(tmp_path / "questions.jsonl", [QUESTIONS[3], row])
    with pytest.raises(UserError, match=complaint):
        check_pictures(Exact().items(path, None))


def test_ids_that_are_missing_unknown_or_repeated_are_named(tmp_path: Path) -> None:
    missing = {key: SAID[key] for key in ("q1", "q3")}
    with pytest.raises(UserError, match=r"2 questions of .*questions\.jsonl have no prediction \(q2, q4\)"):
        Exact().score_files(*files(tmp_path, missing))
    with pytest.raises(UserError, match=r"1 ids are not in .*questions\.jsonl \(q9\)"):
        Exact().score_files(*files(tmp_path, {**SAID, "q9": "red"}))
    predictions, questions = files(tmp_path, SAID)
    predictions.write_text(predictions.read_text() + '{"id": "q3", "answer": "blue"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl: 1 ids come more than once \(q3\)"):
        Exact().score_files(predictions, questions)
    predictions, questions = files(tmp_path, SAID)
    questions.write_text(questions.read_text() + json.dumps(QUESTIONS[1]) + "\n")
    with pytest.raises(UserError, match=r"questions\.jsonl: 1 ids come more than once \(q2\)"):
        Exact().score_files(predictions, questions)


def test_predictions_without_ids_are_in_the_order_of_the_questions(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    said = [{"answer": answer} for answer in ("red", "no", "blue", "yes")]
    predictions = write_lines(tmp_path / "predictions.jsonl", said)
    assert Exact().score_files(predictions, questions).per_item == {"q1": 1, "q2": 0, "q3": 1, "q4": 1}
    write_lines(predictions, [*said, {"answer": "red"}])
    with pytest.raises(UserError, match=r"1 ids are not in .* \(row 5\)"):
        Exact().score_files(predictions, questions)
    write_lines(predictions, [*said[:3], {"id": "q4", "answer": "yes"}])
    with pytest.raises(UserError, match=r"line 4: 'q4' for an id, where the first row has none"):
        Exact().score_files(predictions, questions)
    # what can't be read keeps its place
    predictions.write_text('{"answer": "red"}\n{"answer"\n{"answer": "blue"}\n{"answer": "yes"}\n')
    scores = Exact().score_files(predictions, questions, allow_partial=True)
    assert scores.per_item == {"q1": 1, "q3": 1, "q4": 1}
    assert scores.notes["left_out"] == {"broken": 1, "repeated": 0, "missing": 1, "unknown": 0}


def test_a_question_that_failed_is_wrong(tmp_path: Path) -> None:
    items = Exact().references(write_lines(tmp_path / "questions.jsonl", QUESTIONS))
    for mode in Exact.modes:
        scores = Exact().score(items, {"q1": None, "q2": "Cube", "q3": "blue", "q4": "yes"}, mode)
        assert scores.per_item == {"q1": 0, "q2": 1, "q3": 1, "q4": 1}


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"q1": "red", "q2": "it's ü\n", "7": ""}
    path = tmp_path / "predictions.jsonl"
    path.write_text(Exact().submission([], answers), encoding="utf-8")
    assert Exact().predictions(path).answers == answers


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    assert {task: find_benchmark(task).task for task in BENCHMARKS} == {task: task for task in BENCHMARKS}
    with pytest.raises(
        UserError, match="unknown task 'vqa'; there are vqav2, textvqa, vizwiz, coco-caption, pope, gqa"
    ):
        find_benchmark("vqa")


def test_rows_with_keys_of_other_names_are_asked_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"id": 7, "frage": "q?", "gold": "red"}, {"frage": "w?", "gold": "b"}])
    benchmark = find_benchmark("exact", ["question=frage", "answer=gold"])
    assert [(item.id, item.question, item.references) for item in benchmark.items(rows, None)] == [
        ("7", "q?", ("red",)),
        ("1", "w?", ("b",)),
    ]
    said = write_lines(tmp_path / "said.jsonl", [{"id": 7, "answer": "red"}, {"id": 1, "answer": "red"}])
    command = ["score", "exact", str(said), str(rows), "--json", "--columns", "question=frage", "answer=gold"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] == 0.5
    assert main(["score", "pope", str(said), str(rows), "--columns", "question=frage"]) == 1
    assert "--columns is for exact; pope has files of its own form" in capsys.readouterr().err


def test_references_may_be_several_right_answers_without_a_question(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "answers": ["red", "crimson"]},
        {"id": "b", "answer": ["blue", "navy"]},
        {"id": "c", "answer": 3},
        {"id": "d", "answers": ["", "red", " "]},
    ]
    references = write_lines(tmp_path / "references.jsonl", rows)
    assert [item.references for item in Exact().references(references)] == [
        ("red", "crimson"),
        ("blue", "navy"),
        ("3",),
        ("red",),
    ]
