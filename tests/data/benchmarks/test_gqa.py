"""GQA: exact matches but for case and final punctuation, by kind of question."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks.files import check_pictures
from data.benchmarks.gqa import GQA, normalise
from tests.data.benchmarks.files import picture, score, write
from vlm import UserError

QUESTIONS: dict[str, dict[str, Any]] = {
    "201": {
        "question": "Is it red?",
        "imageId": "n1",
        "answer": "yes",
        "types": {"structural": "verify", "semantic": "attr"},
        "isBalanced": True,
    },
    "07": {
        "question": "What is it?",
        "imageId": "n2",
        "answer": "cell phone",
        "types": {"structural": "query", "semantic": "obj"},
    },
    "x": {"question": "Red or blue?", "imageId": "n1", "answer": "blue", "types": {"structural": "choose"}},
}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("cell phone", True),
        (" Cell Phone.\n", True),
        ("cell phone!?", True),
        ("cell phones", False),
        ("a cell phone", False),
        ("cell-phone", False),
        ("cell  phone", False),
        ("", False),
    ],
)
def test_case_and_final_punctuation_make_no_difference(said: str, right: bool) -> None:
    assert (normalise(said) == normalise("cell phone")) is right


def test_accuracy_goes_by_kind_of_question(tmp_path: Path) -> None:
    references = write(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    said = [{"questionId": i, "prediction": text} for i, text in (("201", "Yes"), ("07", "phone"), ("x", "blue."))]
    scores = GQA().score_files(write(tmp_path / "p.json", said), references)
    assert scores.per_item == {"201": 1, "07": 0, "x": 1}
    assert scores.metrics == pytest.approx(
        {
            "accuracy": 2 / 3,
            "accuracy/binary": 1,
            "accuracy/open": 0,
            "structural/verify": 1,
            "structural/query": 0,
            "structural/choose": 1,
            "semantic/attr": 1,
            "semantic/obj": 0,
        }
    )
    failed = GQA().score(GQA().references(references), {"201": None, "07": "cell phone", "x": None})
    assert failed.per_item == {"201": 0, "07": 1, "x": 0}


def test_only_balanced_questions_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unbalanced = {f"u{n}": {**QUESTIONS["201"], "isBalanced": False} for n in range(3)}
    references = write(tmp_path / "val_all_questions.json", {**QUESTIONS, **unbalanced})
    said = [
        {"questionId": i, "prediction": text} for i, text in (("201", "yes"), ("u1", "no"), ("07", "x"), ("x", "y"))
    ]
    scores = GQA().score_files(write(tmp_path / "p.json", said), references)
    assert scores.per_item == {"201": 1, "07": 0, "x": 0}
    assert scores.metrics["structural/verify"] == 1
    assert scores.notes == {"unscored": 3}
    _, out, _ = score(capsys, "gqa", tmp_path / "p.json", references, "--against", str(tmp_path / "p.json"), "--json")
    assert (json.loads(out)["n"], json.loads(out)["unscored"]) == (3, 3)
    write(tmp_path / "p.json", [*said[:2], {"questionId": "v", "prediction": ""}])
    with pytest.raises(UserError, match=r"2 questions of .* have no prediction \(07, x\); 1 ids are not in .* \(v\)"):
        GQA().score_files(tmp_path / "p.json", references)
    partial = GQA().score_files(tmp_path / "p.json", references, allow_partial=True)
    assert partial.notes == {"unscored": 3, "left_out": {"broken": 0, "repeated": 0, "missing": 2, "unknown": 1}}
    asked = GQA().items(references, tmp_path)
    assert [len(item.references) for item in asked] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(UserError, match=r"val_all_questions\.json: 3 questions, none of which is scored"):
        GQA().score_files(tmp_path / "p.json", write(references, unbalanced))


def test_questions_meet_their_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "questions1.2/testdev_balanced_questions.json", QUESTIONS)
    for name in ("n1", "n2"):
        picture(tmp_path / f"images/{name}.jpg")
    items = GQA().items(tmp_path, None)
    assert [(item.id, item.question, item.references) for item in items] == [
        (i, row["question"], (row["answer"],)) for i, row in QUESTIONS.items()
    ]
    assert [item.image for item in items] == [tmp_path / f"images/{name}.jpg" for name in ("n1", "n2", "n1")]
    assert GQA().items(path, tmp_path / "images") == items
    write(path, {"1": {"question": "?", "imageId": "n1"}})  # the test split comes without answers
    assert GQA().items(path, tmp_path / "images")[0].references == ()
    write(path, {"1": {"question": "?", "imageId": "../../n1"}, "2": {"question": "?", "imageId": "n9"}})
    with pytest.raises(UserError, match=r"2 pictures are not there \(\.\./\.\./n1\.jpg, n9\.jpg\)"):
        check_pictures(GQA().items(tmp_path, None))
    with pytest.raises(UserError, match=r"val_balanced_questions\.json \(of other splits .*\)\. .*stanford\.edu"):
        GQA().items(tmp_path, None, "val_balanced")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"1": {"answer": "x"}, "2": {"question": "?"}}, r"1 rows can't be read \(\[2\]: .*`answer`"),
        ({"1": {"answer": 3}}, r"\[1\]: Expected `str`, got `int`"),
        ([{"answer": "x"}], "a JSON object of objects is needed"),
        ({}, "nothing in it"),
    ],
)
def test_files_of_another_shape_are_refused(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        GQA().references(write(tmp_path / "q.json", content))


def test_a_submission_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "testdev_predictions.json"
    path.write_text(GQA().submission([], {"201": "Yes.", "07": "cell phone"}), encoding="utf-8")
    # the official script compares strictly, so what it gets is cleaned; ids are text, as in its questions
    assert json.loads(path.read_text()) == [
        {"questionId": "201", "prediction": "yes"},
        {"questionId": "07", "prediction": "cell phone"},
    ]
    assert GQA().predictions(path).answers == {"201": "yes", "07": "cell phone"}
