"""VQA accuracy against the official script's scores, and its normaliser against rules written out by hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.benchmarks import find_benchmark
from data.benchmarks.vqa import VQA
from data.benchmarks.vqa_text import clean, process
from vlm import UserError

REAL = os.environ.get("VLM_DEV_DATA", "")
ALL_SAME = pytest.mark.parametrize("mode", ["official", "normalised"])


def annotation(question: int, answers: list[str], **more: Any) -> dict[str, Any]:
    said = [{"answer": answer, "answer_id": n, "answer_confidence": "yes"} for n, answer in enumerate(answers, 1)]
    row = {"question_id": question, "image_id": 7, "answers": said, "answer_type": "other", "question_type": "what"}
    return {**row, **more}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def score(tmp_path: Path, annotations: list[dict[str, Any]], predictions: list[Any], mode: str = "official") -> Any:
    references = write(tmp_path / "annotations.json", {"annotations": annotations})
    return VQA().score_files(write(tmp_path / "predictions.json", predictions), references, mode)


def predicted(question: int, answer: str) -> dict[str, Any]:
    return {"question_id": question, "answer": answer}


@pytest.mark.skipif(not REAL, reason="VLM_DEV_DATA names no folder with vqa-train100")
@pytest.mark.parametrize("predictions", ["mc_raw", "chatty", "annotator1"])
def test_every_question_scores_as_in_the_official_script(tmp_path: Path, predictions: str) -> None:
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


@ALL_SAME
@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (9, 100)])
def test_three_agreeing_annotators_are_worth_ninety(tmp_path: Path, agreeing: int, expected: int, mode: str) -> None:
    answers = ["red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    scores = score(tmp_path, [annotation(1, answers)], [predicted(1, "red")], mode)
    assert scores.metrics["accuracy"] == pytest.approx(expected)
    assert scores.per_item == {"1": pytest.approx(expected)}


def test_where_all_annotators_agree_only_the_official_mode_minds_case(tmp_path: Path) -> None:
    rows = [annotation(1, ["yes"] * 10), annotation(2, ["yes"] * 9 + ["no"])]
    said = [predicted(1, "Yes."), predicted(2, "Yes.")]
    assert score(tmp_path, rows, said).per_item == {"1": 0, "2": 100}
    assert score(tmp_path, rows, said, "normalised").per_item == {"1": 100, "2": 100}
    exact = [predicted(1, " yes\n"), predicted(2, "yes")]  # white space is cleaned in any case
    assert score(tmp_path, rows, exact).per_item == {"1": 100, "2": 100}


def test_equal_answers_without_ids_exclude_one_another_in_the_official_mode(tmp_path: Path) -> None:
    row = annotation(1, ["red"] * 4 + ["blue"] * 6)
    for answer in row["answers"]:
        del answer["answer_id"]
    # "the other nine" are those that differ as a whole: of four equal reds none is left to agree with a red
    official = (4 * 0 + 6 * 1) / 10 * 100
    assert score(tmp_path, [row], [predicted(1, "red")]).per_item["1"] == pytest.approx(official)
    assert score(tmp_path, [row], [predicted(1, "red")], "normalised").per_item["1"] == pytest.approx(100)


@given(answers=st.lists(st.sampled_from(["red", "Red", "a red", "blue", "2", "two"]), min_size=10, max_size=10))
@settings(max_examples=25, deadline=None)
def test_scores_equal_a_count_over_annotators(tmp_path_factory: pytest.TempPathFactory, answers: list[str]) -> None:
    same = {"red": "red", "Red": "red", "a red": "red", "blue": "blue", "2": "2", "two": "2"}
    folder = tmp_path_factory.getbasetemp()
    for mode in ("official", "normalised"):
        means: Callable[[str], str] = (
            (lambda word: word) if mode == "official" and len(set(answers)) == 1 else same.__getitem__
        )
        for said in same:
            total = 0.0
            for leave_out in range(10):
                others = [answers[n] for n in range(10) if n != leave_out]
                total += min(sum(means(other) == means(said) for other in others) / 3, 1) / 10
            told = score(folder, [annotation(1, answers)], [predicted(1, said)], mode)
            assert told.metrics["accuracy"] == pytest.approx(100 * total), (mode, said)


def test_breakdowns_go_by_answer_type_and_question_type(tmp_path: Path) -> None:
    rows = [
        annotation(1, ["yes"] * 10, answer_type="yes/no", question_type="is the"),
        annotation(2, ["2"] * 10, answer_type="number", question_type="how many"),
        annotation(3, ["red"] * 10, answer_type="other", question_type="how many"),
    ]
    told = score(tmp_path, rows, [predicted(1, "no"), predicted(2, "2"), predicted(3, "red")])
    assert {name: round(value, 2) for name, value in told.metrics.items()} == {
        "accuracy": 66.67,
        "accuracy/yes/no": 0,
        "accuracy/number": 100,
        "accuracy/other": 100,
        "question_type/is the": 0,
        "question_type/how many": 100,
    }


NORMALISED = {
    "number words up to ten": ("None one TWO ten eleven", "0 1 2 10 eleven"),
    "articles": ("the A an cat", "cat"),
    "an article alone": ("a", ""),
    "contractions": ("dont isnt hes", "don't isn't he's"),
    "a contraction never made": ("Im Ive", "im ive"),
    "a strange contraction": ("somebody'd", "somebodyd"),
    "marks that touch a space go": ("red , blue ; green", "red blue green"),
    "marks between letters become spaces": ("red/blue-green", "red blue green"),
    "a comma in a number takes all marks away": ("1,000 red/blue", "1000 redblue"),
    "what is kept": ("it's 5:30 & 50% $3 #4", "it's 5:30 & 50% $3 #4"),
    "periods": ("a.b. U.S. etc.", "ab us etc"),
    "a period before a digit": ("1.5 .5 v.2", "1.5 .5 v.2"),
    "brackets and quotes": ('(red) "blue" [x]', "red blue x"),
    "white space": ("  red \t\n  blue ", "red blue"),
    "words of numbers come before articles": ("a none the", "0"),
    "other letters": ("ÉTÉ", "été"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("rule", NORMALISED)
def test_the_normaliser_follows_the_official_rules(rule: str) -> None:
    text, expected = NORMALISED[rule]
    assert process(clean(text)) == expected


def test_at_most_thirty_two_periods_go() -> None:
    assert process("." * 40 + "x") == "." * 8 + "x"


def test_a_mark_counts_as_touching_a_space_anywhere_in_the_text() -> None:
    assert process("red-blue - green") == "redblue green"  # one dash by a space takes all dashes away
    assert process("red-blue green") == "red blue green"


WORD = st.text("bcdfghk", min_size=3, max_size=6)  # without vowels, so that none is a contraction ("hed" is one)
PLAIN = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@given(words=PLAIN, mark=st.sampled_from(list(';/[]"{}()=+\\_-><@`,?!')))
@settings(max_examples=100, deadline=None)
def test_marks_articles_and_case_make_no_difference_to_plain_words(words: str, mark: str) -> None:
    assert process(words) == words
    assert process(f"The {words.upper()}{mark} ") == words
    assert process(f"{words} {mark} a") == words
    assert process(words.replace(" ", mark)) == words


@given(text=st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_is_normalised_holds_no_articles_capital_letters_or_double_spaces(text: str) -> None:
    words = process(clean(text)).split(" ")
    assert not {"a", "an", "the", "none", "two"} & set(words)
    assert words == [""] or "" not in words
    assert all(word == word.lower() or "'" in word for word in words)


def test_ids_that_are_missing_unknown_or_repeated_are_named(tmp_path: Path) -> None:
    rows = [annotation(question, ["red"] * 10) for question in range(1, 10)]
    good = [predicted(question, "red") for question in range(1, 10)]
    assert score(tmp_path, rows, good).metrics["accuracy"] == 100
    with pytest.raises(UserError, match=r"no prediction in .*predictions\.json for 7 questions: 3, 4, 5, 6, 7 \.\.\."):
        score(tmp_path, rows, good[:2])
    with pytest.raises(UserError, match=r"not asked in .*annotations\.json, but predicted: 1 questions: 77"):
        score(tmp_path, rows, [*good, predicted(77, "red")])
    with pytest.raises(UserError, match=r"predictions\.json: 1 ids come twice, the first is 4"):
        score(tmp_path, rows, [*good, predicted(4, "blue")])
    with pytest.raises(UserError, match=r"annotations\.json: 1 ids come twice, the first is 4"):
        score(tmp_path, [*rows, rows[3]], good)


@pytest.mark.parametrize(
    ("predictions", "complaint"),
    [
        ({}, "predictions are a list"),
        ([], "predictions are a list"),
        (["red"], r"\[0\]: a prediction needs a question_id and an answer"),
        ([{"answer": "red"}], r"\[0\]: a prediction needs a question_id"),
        ([predicted(1, "red"), {"question_id": 2, "answer": 3}], r"\[1\]: a prediction needs .* which is text"),
    ],
)
def test_predictions_of_another_shape_are_refused(tmp_path: Path, predictions: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        score(tmp_path, [annotation(1, ["red"] * 10)], predictions)


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 1},
        {**annotation(1, ["red"]), "answers": []},
        {**annotation(1, ["red"]), "answers": ["red"]},
        {key: value for key, value in annotation(1, ["red"]).items() if key != "question_type"},
    ],
)
def test_annotations_of_another_shape_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"annotations\.json: annotation 1 needs question_id, answers"):
        score(tmp_path, [annotation(0, ["red"] * 10), row], [predicted(0, "red"), predicted(1, "red")])
    with pytest.raises(UserError, match="not a VQA annotations file"):
        VQA().references(write(tmp_path / "other.json", {"questions": []}))


@pytest.mark.parametrize("as_folder", [True, False])
def test_questions_meet_their_annotations_and_pictures(tmp_path: Path, as_folder: bool) -> None:
    data, images = tmp_path / "data", tmp_path / "val2014"
    data.mkdir()
    images.mkdir()
    questions = [{"question_id": n, "image_id": n, "question": f"what {n}?"} for n in (1, 2, 3)]
    file = write(data / "v2_questions.json", {"questions": questions})
    write(data / "v2_annotations.json", {"annotations": [annotation(2, ["red"] * 9 + ["blue"])]})
    names = ["COCO_val2014_000000000001.jpg", "2.jpg", "3.png"]
    for name in names:
        Image.new("RGB", (4, 4)).save(images / name)
    items = find_benchmark("vqav2").items(data if as_folder else file, images)
    assert [item.question for item in items] == ["what 1?", "what 2?", "what 3?"]
    assert [item.image for item in items] == [images / name for name in names]
    assert [len(item.references) for item in items] == [0, 10, 0]
    (images / "3.png").unlink()
    with pytest.raises(UserError, match=r"val2014: no picture of image 3 \(COCO_\*_000000000003\.jpg\)"):
        VQA().items(data, images)
    with pytest.raises(UserError, match="no VQA questions file there"):
        VQA().items(images, images)


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"1": "red", "22": "it's \u00fc", "x7": ""}
    path = tmp_path / "predictions.json"
    path.write_text(VQA().submission(answers), encoding="utf-8")
    assert VQA().read_predictions(path) == answers
    assert json.loads(path.read_text())[0] == {"question_id": 1, "answer": "red"}  # numbers, as the server wants them
