"""POPE: the official reading of an answer, its measures against a count by hand, its files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks import Item
from data.benchmarks.files import check_pictures
from data.benchmarks.yes_no import POPE, says_yes
from tests.data.benchmarks.files import picture, write, write_lines
from vlm import UserError


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("no", False),
        ("No", False),
        ("No, there is none.", False),
        ("There is not. Yes.", False),
        ("I do not see, no", False),
        ("yes", True),
        ("Yes. No.", True),  # the first sentence alone
        ("NO", True),
        ("Nope", True),
        ("No!", True),
        ("no\n", True),
        ("there isn't", True),
        ("none", True),
        ("", True),
        ("yes,no", True),  # one word, once the comma is gone
        ("yes, no", False),
    ],
)
def test_answers_are_read_as_the_official_script_reads_them(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def rows(labels: list[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {"question_id": n, "image": f"COCO_val2014_{n:012}.jpg", "text": f"Is there {n}?", "label": label, **more}
        for n, label in enumerate(labels, 1)
    ]


def official(said: list[str], labels: list[str]) -> dict[str, float]:
    """As the script counts, row by row."""
    tp = tn = fp = fn = 0
    for text, label in zip(said, labels, strict=True):
        words = text.split(".")[0].replace(",", "").split(" ")
        yes = not ("No" in words or "not" in words or "no" in words)
        if yes:
            tp, fp = tp + (label != "no"), fp + (label == "no")
        else:
            fn, tn = fn + (label != "no"), tn + (label == "no")
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": (tp + fp) / len(said),
    }


def test_measures_equal_a_count_by_hand(tmp_path: Path) -> None:
    rng = random.Random(0)
    labels = rng.choices(["yes", "no"], k=400)
    said = [rng.choice(["Yes", "No", "no.", "Nope", label, "There is not, I think. Yes"]) for label in labels]
    references = write_lines(tmp_path / "coco_pope_random.json", rows(labels))
    answers = [{"question_id": n, "answer": text} for n, text in enumerate(said, 1)]
    rng.shuffle(answers)
    scores = POPE().score_files(write_lines(tmp_path / "a.jsonl", answers), references)
    assert scores.metrics == pytest.approx(official(said, labels))
    assert sum(scores.per_item.values()) / 400 == pytest.approx(scores.metrics["accuracy"])
    for name, (low, high) in scores.intervals(200).items():
        assert low < scores.metrics[name] < high


def test_answers_without_ids_are_in_the_order_of_the_questions(tmp_path: Path) -> None:
    """As the official script reads them; neither file needs more than what is compared."""
    labels, said = ["yes", "no", "no", "yes"], ["yes", "yes", "no", "yes"]
    predictions = write_lines(tmp_path / "a.jsonl", [{"question": "Is there?", "answer": text} for text in said])
    references = write_lines(tmp_path / "coco_pope_random.json", rows(labels))
    assert POPE().score_files(predictions, references).metrics == pytest.approx(official(said, labels))
    write_lines(references, [{"label": label} for label in labels])
    scores = POPE().score_files(predictions, references)
    assert scores.per_item == {"0": 1, "1": 0, "2": 1, "3": 1}
    with pytest.raises(UserError, match=r"1 questions of .*pope_random\.json have no prediction \(3\)"):
        POPE().score_files(write_lines(predictions, [{"answer": "yes"}] * 3), references)


def test_a_question_that_failed_is_wrong_whatever_was_right(tmp_path: Path) -> None:
    items = POPE().references(write_lines(tmp_path / "r.json", rows(["yes", "no", "yes", "no"])))
    scores = POPE().score(items, {"1": None, "2": None, "3": "yes", "4": "no"})
    assert scores.per_item == {"1": 0, "2": 0, "3": 1, "4": 1}
    assert set(scores.metrics.values()) == {0.5}  # one of each kind


def test_what_never_says_yes_has_no_precision(tmp_path: Path) -> None:
    items = POPE().references(write_lines(tmp_path / "r.json", rows(["yes", "no"])))
    assert POPE().score(items, {"1": "no", "2": "no"}).metrics == {
        "accuracy": 0.5,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
    }


def test_questions_meet_their_pictures(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "coco/coco_pope_random.json", rows(["yes", "no"]))
    for n in (1, 2):
        picture(tmp_path / f"val2014/COCO_val2014_{n:012}.jpg")
    items = POPE().items(tmp_path, None)
    assert [(item.id, item.question, item.references) for item in items] == [
        ("1", "Is there 1?", ("yes",)),
        ("2", "Is there 2?", ("no",)),
    ]
    assert [item.image for item in items] == [tmp_path / f"val2014/COCO_val2014_{n:012}.jpg" for n in (1, 2)]
    assert POPE().items(path, tmp_path / "val2014") == items
    write_lines(tmp_path / "coco/coco_pope_popular.json", rows(["yes"]))
    with pytest.raises(UserError, match=r"several files fit \(coco_pope_popular\.json, coco_pope_random\.json\)"):
        POPE().items(tmp_path, None)
    assert len(POPE().items(tmp_path, None, "popular")) == 1
    (tmp_path / "val2014/COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"1 pictures are not there \(COCO_val2014_000000000001\.jpg\)"):
        check_pictures(POPE().items(tmp_path, None, "popular"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not there: coco_pope_adversarial\.json\. .*github\.com/AoiDragon/POPE"):
        POPE().items(tmp_path / "empty", None, "adversarial")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question_id": 2, "label": "maybe"}, r"line 2: question_id 2, label 'maybe' \(yes or no\)"),
        ({"question_id": 2.5, "label": "yes"}, "line 2: question_id 2.5"),
        ({"question_id": 2}, "line 2: label are needed"),
        (["yes"], "line 2: label are needed"),
    ],
)
def test_labels_of_another_shape_are_refused(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write_lines(tmp_path / "r.json", [*rows(["yes"]), row])
    with pytest.raises(UserError, match=f"1 rows can't be read .{complaint}"):
        POPE().references(path)


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"1": "yes", "b": "n\u00f6"}
    path = tmp_path / "answers.jsonl"
    path.write_text(POPE().submission([], answers), encoding="utf-8")
    assert POPE().predictions(path).answers == answers
    assert json.loads(path.read_text().splitlines()[0]) == {"question_id": 1, "answer": "yes"}
    write(path, [{"question_id": 1, "text": "yes"}])  # LLaVA's answers call them text
    assert POPE().predictions(path).answers == {"1": "yes"}


def llavas_answers(first: int, labels: list[str]) -> list[dict[str, Any]]:
    suffix = "Answer the question using a single word or phrase."
    return [
        {"question_id": first + n, "prompt": f"Is there {n + 1}?\n{suffix}", "text": label.capitalize()}
        for n, label in enumerate(labels)
    ]


@pytest.mark.parametrize("prompt", ["Is there 1?", "?", ""])
def test_llavas_answers_are_found_by_their_ids(tmp_path: Path, prompt: str) -> None:
    """Whatever they were asked, if the ids are those of the file."""
    references = write_lines(tmp_path / "coco_pope_random.json", rows(["yes", "no"]))
    said = [{"question_id": n, "prompt": prompt, "text": text} for n, text in ((2, "No"), (1, "Yes"))]
    assert set(POPE().score_files(write_lines(tmp_path / "a.jsonl", said), references).per_item.values()) == {1}


def test_llavas_answers_to_all_three_files_are_found_by_the_questions_in_a_row(tmp_path: Path) -> None:
    labels = ["yes", "no", "no", "yes"]
    references = write_lines(tmp_path / "coco_pope_popular.json", rows(labels))
    zero = write_lines(tmp_path / "a.jsonl", llavas_answers(0, labels))
    assert set(POPE().score_files(zero, references).per_item.values()) == {1}
    others = [{"question_id": n, "prompt": f"Is there a cat {n}?", "text": "yes"} for n in range(4)]
    path = write_lines(tmp_path / "a.jsonl", [*others, *llavas_answers(4, labels)])
    with pytest.raises(UserError, match=r"4 ids are not in .*popular\.json \(0 of other questions, 1 of other"):
        POPE().score_files(path, references)
    scores = POPE().score_files(path, references, allow_partial=True)
    assert scores.per_item == {"1": 1, "2": 1, "3": 1, "4": 1}
    assert scores.notes["left_out"] == {"broken": 0, "repeated": 0, "missing": 0, "unknown": 4}
    # where the questions aren't there in a row, ids are all there is
    path = write_lines(tmp_path / "a.jsonl", llavas_answers(4, labels)[:3])
    with pytest.raises(
        UserError, match=r"3 questions of .* have no prediction \(1, 2, 3\); 2 ids are not in .* \(5, 6"
    ):
        POPE().score_files(path, references)


@pytest.mark.parametrize(("label", "wrong"), [("yes", "no"), ("no", "yes")])
def test_a_question_that_failed_is_wrong_in_its_submission_too(label: str, wrong: str) -> None:
    benchmark = POPE()
    item = Item("1", "is there?", (label,))
    assert benchmark.wrong(item) == wrong
    assert benchmark.score([item], {"1": benchmark.wrong(item)}).metrics["accuracy"] == 0
