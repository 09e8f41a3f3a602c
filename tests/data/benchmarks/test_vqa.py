"""VQA accuracy: its modes, its files, and its normaliser against rules written out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.benchmarks.files import check_pictures
from data.benchmarks.vqa import VQA
from data.benchmarks.vqa_text import clean, process
from tests.data.benchmarks.files import annotation, picture, write
from vlm import UserError

ALL_SAME = pytest.mark.parametrize("mode", ["official", "normalised"])


def score(tmp_path: Path, annotations: list[dict[str, Any]], predictions: list[Any], mode: str = "official") -> Any:
    references = write(tmp_path / "annotations.json", {"annotations": annotations})
    return VQA().score_files(write(tmp_path / "predictions.json", predictions), references, mode)


def predicted(question: int, answer: str) -> dict[str, Any]:
    return {"question_id": question, "answer": answer}


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
    rows = [row, annotation(2, ["red"] * 10)]
    scores = score(tmp_path, rows, [predicted(1, "red"), predicted(2, "red")])
    assert scores.per_item == {"1": pytest.approx(official), "2": 100}
    assert scores.notes == {"annotators_without_ids": 1}
    scores = score(tmp_path, rows, [predicted(1, "red"), predicted(2, "red")], "normalised")
    assert (scores.per_item, scores.notes) == ({"1": 100, "2": 100}, {})


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


@pytest.mark.parametrize("how", ["missing", "null"])
@pytest.mark.parametrize("without", [{"answer_type"}, {"question_type"}, {"answer_type", "question_type"}])
def test_annotations_without_types_are_scored_without_the_breakdown(
    tmp_path: Path, without: set[str], how: str
) -> None:
    """OK-VQA, TextVQA and VizWiz in the form that OpenFlamingo publishes have none, or one of them."""
    rows = [annotation(1, ["yes"] * 10), annotation(2, ["2"] * 10)]
    for row in rows:
        del row["image_id"]
        for name in without:
            row[name] = None
            if how == "missing":
                del row[name]
    told = score(tmp_path, rows, [predicted(1, "yes"), predicted(2, "3")])
    assert told.per_item == {"1": 100, "2": 0}
    left = {"answer_type": "accuracy/other", "question_type": "question_type/what"}
    assert told.metrics == {"accuracy": 50} | {name: 50 for kind, name in left.items() if kind not in without}


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


def test_ids_that_are_missing_unknown_or_repeated_are_named_at_once(tmp_path: Path) -> None:
    rows = [annotation(question, ["red"] * 10) for question in range(1, 10)]
    good = [predicted(question, "red") for question in range(1, 10)]
    assert score(tmp_path, rows, good).metrics["accuracy"] == 100
    with pytest.raises(
        UserError, match=r"7 questions of .*annotations\.json have no prediction \(3, 4, 5, 6, 7, \.\.\.\)"
    ):
        score(tmp_path, rows, good[:2])
    with pytest.raises(
        UserError,
        match=r"predictions\.json: 1 ids come more than once \(4\); 1 questions of .*json have no prediction \(9\); "
        r"1 ids are not in .*annotations\.json \(77\); --allow-partial scores what fits",
    ):
        score(tmp_path, rows, [*good[:-1], predicted(77, "red"), predicted(4, "blue")])
    with pytest.raises(UserError, match=r"annotations\.json: 1 ids come more than once \(4\)"):
        score(tmp_path, [*rows, rows[3]], good)


@pytest.mark.parametrize(
    ("predictions", "complaint"),
    [
        ({}, "line 1: question_id is a number or text, not nothing"),
        ([], "an empty list"),
        (["red"], r"1 rows can't be used \(\[0\]: an object is needed, not 'red'\)"),
        ([{"answer": "red"}], r"\[0\]: question_id is a number or text, not nothing"),
        ([predicted(1, "red"), {"question_id": 2, "answer": 3}], r"\[1\]: answer is text, not 3"),
        ([predicted(1, "red"), {"question_id": True, "answer": "x"}], r"\[1\]: question_id is .*, not True"),
        ([predicted(1, "red"), {"question_id": 2, "answer": float("nan")}], r"\[1\]: answer is text, not nan"),
        ([predicted(1, "\ud800")], r"\[0\]: answer is text, not '\\ud800'"),
        ([None] * 7, r"7 rows can't be used \((\[\d\]: an object is needed, not nothing, ){5}\.\.\.\)"),
    ],
)
def test_predictions_of_another_shape_are_refused(tmp_path: Path, predictions: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        score(tmp_path, [annotation(1, ["red"] * 10)], predictions)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question_id": 1}, "missing required field `answers`"),
        ({**annotation(1, ["red"]), "answers": []}, "no answers"),
        ({**annotation(1, ["red"]), "answers": ["red"]}, "Expected `object`, got `str`"),
        ({**annotation(1, ["red"]), "question_id": None}, "got `null` - at `\\$.question_id`"),
        ("red", "Expected `object`, got `str`"),
        ({**annotation(1, ["red"]), "question_type": 3}, "at `\\$.question_type`"),
    ],
)
def test_annotations_of_another_shape_are_refused(tmp_path: Path, row: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=r"annotations\.json: 1 rows can't be read \(annotations\[1\]: .*" + complaint):
        score(tmp_path, [annotation(0, ["red"] * 10), row], [predicted(0, "red"), predicted(1, "red")])
    with pytest.raises(UserError, match="a JSON object with a list 'annotations' is needed"):
        VQA().references(write(tmp_path / "other.json", {"questions": []}))
    with pytest.raises(UserError, match="nothing in it"):
        VQA().references(write(tmp_path / "empty.json", {"annotations": []}))
    (tmp_path / "half.json").write_text('{"annotations": [{"question_id": 1, "answers": [{"answer": "\\ud800"}]}]}')
    with pytest.raises(UserError, match=r"half\.json: cannot be read as JSON \(.*hex escape \(byte \d+\)\)"):
        VQA().references(tmp_path / "half.json")


QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def download(folder: Path, split: str = "val2014") -> Path:
    """Three questions and one annotation, named as they're published, and their pictures."""
    rows = [{"question_id": 10 * n, "image_id": n, "question": f"what {n}?"} for n in (1, 2, 300)]
    told = [annotation(20, ["red"] * 9 + ["blue"], answer_type="number")]
    write(folder / QUESTIONS.replace("val2014", split), {"info": {}, "questions": rows})
    write(folder / ANNOTATIONS.replace("val2014", split), {"info": {}, "annotations": told})
    for number in (1, 2, 300):
        picture(folder / split / f"COCO_{split}_{number:012}.jpg")
    return folder


@pytest.mark.parametrize("named", ["folder", "file", "images"])
def test_questions_meet_their_annotations_and_pictures(tmp_path: Path, named: str) -> None:
    folder = download(tmp_path)
    data = folder / QUESTIONS if named == "file" else folder
    items = VQA().items(data, folder / "val2014" if named == "images" else None)
    assert [(item.id, item.question) for item in items] == [("10", "what 1?"), ("20", "what 2?"), ("3000", "what 300?")]
    assert [item.image for item in items] == [folder / f"val2014/COCO_val2014_{n:012}.jpg" for n in (1, 2, 300)]
    assert [len(item.references) for item in items] == [0, 10, 0]
    assert items[1].groups == ("accuracy/number", "question_type/what")
    assert VQA().score([items[1]], {"20": "red"}).metrics["accuracy"] == 100


def test_pictures_are_found_by_number_under_any_name(tmp_path: Path) -> None:
    folder = download(tmp_path)
    (folder / "val2014/COCO_val2014_000000000002.jpg").rename(folder / "val2014/2.PNG")
    assert VQA().items(folder, None)[1].image == folder / "val2014/2.PNG"
    (folder / "val2014/2.PNG").unlink()
    (folder / "val2014/COCO_val2014_000000000300.jpg").unlink()
    with pytest.raises(UserError, match=r"2 pictures are not there \(of image 2, of image 300\), .*val2014: no"):
        check_pictures(VQA().items(folder, None))
    (folder / "val2014/2.PNG").touch()
    with pytest.raises(UserError, match=r"2 pictures .* \(2\.PNG, of image 300\), such as .*2\.PNG: an empty file"):
        check_pictures(VQA().items(folder, None))
    with pytest.raises(UserError, match="nowhere: no such image folder"):
        VQA().items(folder, tmp_path / "nowhere")


def test_what_is_missing_is_listed_with_where_it_is_published(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"not there: {QUESTIONS}\. .* https://visualqa.org/download.html"):
        VQA().items(tmp_path / "empty", None)
    download(tmp_path / "both")
    download(tmp_path / "both", "train2014")
    with pytest.raises(
        UserError, match=r"several files fit \(v2_.*train2014.*, v2_.*val2014.*\); name one of them, or its split"
    ):
        VQA().items(tmp_path / "both", None)
    assert "train2014" in str(VQA().items(tmp_path / "both", None, "train2014")[0].image)
    other = r"v2_OpenEnded_mscoco_test2015_questions\.json \(of other splits there are v2_.*, v2_.*\)"
    with pytest.raises(UserError, match=other):
        VQA().items(tmp_path / "both", None, "test2015")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        VQA().items(tmp_path / "nowhere", None)


def test_test_questions_come_without_annotations(tmp_path: Path) -> None:
    (download(tmp_path) / ANNOTATIONS).unlink()
    assert [item.references for item in VQA().items(tmp_path, None)] == [(), (), ()]


def test_a_submission_reads_back(tmp_path: Path) -> None:
    """Normalised, as LLaVA's converter writes it: by M4C's processor, which sets 's apart."""
    answers = {"1": "Red.", "22": "It's \u00fc", "x7": "", "8": "the two"}
    path = tmp_path / "predictions.json"
    path.write_text(VQA().submission([], answers), encoding="utf-8")
    assert VQA().predictions(path).answers == {"1": "red", "22": "it 's \u00fc", "x7": "", "8": "2"}
    assert json.loads(path.read_text())[0] == {"question_id": 1, "answer": "red"}  # numbers, as the server wants them


def test_ids_of_any_length_are_submitted(tmp_path: Path) -> None:
    long = "9" * 5000
    path = tmp_path / "results.json"
    path.write_text(VQA().submission([], {"9" * 18: "a", "9" * 19: "b", long: "c", "07": "d"}), encoding="utf-8")
    assert [row["question_id"] for row in json.loads(path.read_text())] == [int("9" * 18), "9" * 19, long, "07"]
    assert VQA().predictions(path).answers[long] == "c"
