"""ScienceQA: letters read from answers, those that can't be read listed, its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks.choice import ScienceQA
from data.benchmarks.files import check_pictures
from data.benchmarks.letters import read_letter
from tests.data.benchmarks.files import picture, score, write, write_lines
from vlm import UserError

CHOICES = ("a dog", "Plants", "solid", "a gas")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. Plants", "B"),
        ("D. no choice of that name", "D"),
        ("The answer is C.", "C"),
        ("LECTURE: things. The answer is C. BECAUSE: so", "C"),
        ("The answer is C", "C"),
        ("The answer is C. No, the end. The answer is C.", "C"),
        ("The answer is A. Or rather: The answer is B.", None),
        ("The answer is E.", None),
        ("E", None),
        ("b", "B"),
        ("(b)", "B"),
        ("B)", "B"),
        ("B: Plants", "B"),
        ("**B**", "B"),
        ("Answer: B", "B"),
        ("the correct option is (d), a gas", "D"),
        ("plants", "B"),
        ("Solid.", "C"),
        ("a dog", "A"),
        ("A dog", "A"),
        ("A", "A"),
        ("a", "A"),
        ("A cat", None),
        ("a cat", None),
        ("Because of gravity", None),
        ("", None),
        ("I don't know", None),
        ("AB", None),
        ("1", None),
    ],
)
def test_letters_are_read_from_answers(answer: str, letter: str | None) -> None:
    assert read_letter(answer, CHOICES) == letter


def test_a_choice_that_stands_there_twice_names_no_letter() -> None:
    assert read_letter("same", ("same", "Same.", "other")) is None


def problem(answer: int = 0, **more: Any) -> dict[str, Any]:
    return {"question": "Which?", "choices": ["x", "y", "z"], "answer": answer, "hint": "", "image": None, **more}


PROBLEMS = {
    "3": problem(0, image="image.png", split="test", subject="natural science", grade="grade4", hint="Look."),
    "5": problem(1, split="test", subject="social science", grade="grade4"),
    "8": problem(2, split="test", subject="natural science", grade="grade2"),
    "9": problem(2, split="val"),
}


def test_answers_without_a_letter_are_wrong_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = write(tmp_path / "problems.json", PROBLEMS)
    said = [{"question_id": i, "text": text} for i, text in (("3", "A."), ("5", "no idea"), ("8", "C"))]
    scores = ScienceQA().score_files(write_lines(tmp_path / "p.jsonl", said), references)
    assert scores.per_item == {"3": 1, "5": 0, "8": 1}  # the split that nobody answered isn't asked for
    assert scores.metrics == pytest.approx(
        {
            "accuracy": 2 / 3,
            "subject/natural science": 1,
            "grade/grade4": 0.5,
            "accuracy/image": 1,
            "subject/social science": 0,
            "accuracy/no image": 0.5,
            "grade/grade2": 1,
        }
    )
    assert scores.notes == {"unparsed": 1, "unparsed_answers": [{"id": "5", "answer": "no idea"}]}
    _, out, _ = score(capsys, "scienceqa", tmp_path / "p.jsonl", references, "--json")
    assert json.loads(out)["unparsed_answers"] == [{"id": "5", "answer": "no idea"}]
    _, out, _ = score(capsys, "scienceqa", tmp_path / "p.jsonl", references)
    assert 'unparsed_answers: [{"id": "5", "answer": "no idea"}]' in out
    with pytest.raises(UserError, match=r"2 questions of .* have no prediction \(5, 8\)"):
        ScienceQA().score_files(write_lines(tmp_path / "p.jsonl", said[:1]), references)
    more = write_lines(tmp_path / "p.jsonl", [*said, {"question_id": "9", "text": "C"}])
    assert ScienceQA().score_files(more, references).n == 4


def test_a_question_that_failed_is_wrong_but_not_unparsed(tmp_path: Path) -> None:
    items = ScienceQA().references(write(tmp_path / "problems.json", PROBLEMS))
    scores = ScienceQA().score(items, {"3": "A", "5": None, "8": None, "9": "C"})
    assert scores.per_item == {"3": 1, "5": 0, "8": 0, "9": 1}
    assert scores.notes == {"unparsed": 0, "unparsed_answers": []}


def test_questions_are_asked_with_their_context_choices_and_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "problems.json", PROBLEMS)
    image = picture(tmp_path / "images/test/3/image.png")
    items = ScienceQA().items(tmp_path, None)
    assert [(item.id, item.image, item.references) for item in items] == [
        ("3", image, ("A",)),
        ("5", None, ("B",)),
        ("8", None, ("C",)),
    ]
    assert items[0].question == "Context: Look.\nWhich?\nA. x\nB. y\nC. z"
    assert items[1].question == "Which?\nA. x\nB. y\nC. z"
    assert items[0].details == ("x", "y", "z")
    assert [item.id for item in ScienceQA().items(path, tmp_path / "images", "val")] == ["9"]
    assert ScienceQA().items(path, tmp_path / "images/test") == items
    with pytest.raises(UserError, match=r"no problem is of the split 'dev'"):
        ScienceQA().items(path, None, "dev")
    image.unlink()
    with pytest.raises(UserError, match=r"1 pictures are not there \(3/image\.png\)"):
        check_pictures(ScienceQA().items(tmp_path, None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not there: problems\.json\. .*github\.com/lupantech/ScienceQA"):
        ScienceQA().items(tmp_path / "empty", None)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "?", "choices": ["x"], "answer": 0}, "1 choices"),
        ({"question": "?", "choices": ["x", "y"], "answer": 2}, "answer 2 of 2 choices"),
        ({"question": "?", "choices": ["x", "y"], "answer": "A"}, "Expected `int`, got `str`"),
    ],
)
def test_problems_of_another_shape_are_refused(tmp_path: Path, row: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"1 rows can't be read \(\[4\]: {complaint}"):
        ScienceQA().references(write(tmp_path / "problems.json", {"3": problem(), "4": row}))


def test_submissions_read_back(tmp_path: Path) -> None:
    path = tmp_path / "outputs.json"
    path.write_text(ScienceQA().submission([], {"3": "A", "5": "\u00fc"}), encoding="utf-8")
    assert ScienceQA().predictions(path).answers == {"3": "A", "5": "\u00fc"}
    # as LLaVA's script writes them: a long file whose outputs come last
    write(path, {"acc": 1.0, "results": {str(n): 0 for n in range(999)}, "outputs": {"3": "A", "5": 7}})
    found = ScienceQA().predictions(path)
    assert (found.answers, found.broken) == ({"3": "A"}, ["outputs[5]: text is needed, not 7"])
    path.write_text('{"outputs": {"3": "A", "5": "B", "3": "C"}}')
    found = ScienceQA().predictions(path)
    assert (found.answers, found.repeated) == ({"3": "A", "5": "B"}, ["3"])
    write_lines(path, [{"question_id": 3, "text": 'he said "outputs"'}])
    assert ScienceQA().predictions(path).answers == {"3": 'he said "outputs"'}


@pytest.mark.parametrize(
    "answer", ["B or C", "(B) or (C)", "b or c", "Answer: B or C", "B, C", "A, B", "B, A", "C is wrong"]
)
def test_an_answer_that_names_two_letters_or_takes_one_back_names_none(answer: str) -> None:
    assert read_letter(answer, ["red", "green", "blue"]) is None


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "B.", "B. green", "Answer: B", "The answer is B.", "B because A is not"]
)
def test_an_answer_that_names_one_letter_names_it(answer: str) -> None:
    assert read_letter(answer, ["red", "green", "blue"]) == "B"


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    "phrase",
    [
        "X is correct",
        "X is blue",
        "X was seen",
        "X because it is red",
        "X since it's red",
        "X best matches the picture",
        "X matches",
        "X seems right",
        "X has a tail",
        "X shows a dog",
        "X would be best",
        "X most likely shows a dog",
        "X clearly is",
        "X as it is red",
        "X with the dog",
        "X, because red",
        "X. blue",
        "X!",
        "X;",
        "X: blue",
        "(X) blue",
        "X\nbecause",
        "The answer is: X",
        "Answer is: X",
        "The correct answer is: X. blue",
        "the answer is: X",
        "Answer: X",
        "Option X is correct",
        "The best choice is X",
        "The answer is X",
    ],
)
def test_every_letter_is_read_alike(phrase: str, letter: str) -> None:
    assert read_letter(phrase.replace("X", letter), ["red", "green", "blue", "white"]) == letter
    if not phrase.startswith("The answer is X"):
        lower = phrase.replace("X", letter.lower())
        assert read_letter(lower, ["red", "green", "blue", "white"]) == letter


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    "phrase",
    [
        "X is wrong",
        "X isn't right",
        "X is NOT correct",
        "X does not match",
        "X doesn't match",
        "X cannot be",
        "X is not",
    ],
)
def test_every_letter_is_taken_back_alike(phrase: str, letter: str) -> None:
    assert read_letter(phrase.replace("X", letter), ["red", "green", "blue", "white"]) is None


@pytest.mark.parametrize(
    "answer",
    [
        "A dog",
        "a dog",
        "A dog is seen",
        "A best friend",
        "A most unusual dog",
        "A for-profit firm",
        "A clearly visible dog",
        "A family is here",
        "A can opener",
        "(A dog)",
        "the answer is a dog",
        "The answer is: a dog",
        "Answer: a dog",
        "A bus",
        "A likely story",
        "A so-so dog",
    ],
)
def test_an_article_is_no_letter(answer: str) -> None:
    assert read_letter(answer, ["red", "green", "blue", "white"]) is None
