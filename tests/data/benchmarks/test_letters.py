"""Letters of MMBench's answers, against VLMEvalKit's rules written out: what it misreads isn't read."""

import random
import re
from collections.abc import Mapping

import pytest

from data.benchmarks.letters import read_letter, read_option

FRUIT = {"A": "apple", "B": "banana", "C": "cherry", "D": "date"}


def can_infer(answer: str, options: Mapping[str, str], end: str = "") -> str | None:
    """VLMEvalKit's `can_infer`, from its rules: words between its marks; one letter among them, not far from the end;
    then "answer is X"; then the one option whose text is there, in an answer that isn't long.

    end: what must follow X; by its own rule nothing, so that "answer is cherry" is C, and "answer is difficult" D.
    """
    words = re.split(r"[\s.()\[\],:;!*#{}]+", answer)
    words = [word for word in words if word]
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and len(words) - words.index(present[0]) <= 4:
        return present[0]
    if (found := re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**" + end, answer)) and found[
        1
    ].upper() in options:
        return found[1].upper()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    held = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


READ = {
    "Final answer: C": "C",
    "**C**": "C",
    r"\boxed{B}": "B",
    r"$\boxed{\text{B}}$": "B",
    "B:banana": "B",
    "I think it is C": "C",
    "It is a banana": "B",
    "The image shows a Banana.": "B",
    "(C)": "C",
    "C)": "C",
    "answer is (B).": "B",
    "Option D": "D",
    "### D": "D",
    "{A}": "A",
    "It is A": "A",
    "I choose C.": "C",
    "It is C. I think": "C",
    "It's not clear, but I think C": "C",
    "The option is\nC": "C",
    "Bananas": "B",
    "The correct answer is **B**. Here's why: A is red, and C is blue": "B",
    "The correct answer is B. The others, A and C, are red": "B",
    "I would say that the answer is D since dates are brown and apples aren't": "D",
}


@pytest.mark.parametrize("answer", READ)
def test_what_vlmevalkit_reads_is_read(answer: str) -> None:
    assert can_infer(answer, FRUIT) == READ[answer] == read_option(answer, FRUIT)


UNREAD = [
    "Sorry, I can't help with images of people yet.",
    "I'm sorry, but without the image provided I can't choose. B",
    "Cannot determine the answer. C",
    "I can't process this file. banana",
    "Failed to obtain answer via API. A",
    "I cannot determine the answer.",
    "I cannot say whether it is B",
    "I'm unable to identify the banana",
    "I can't see a banana here",
    "I don't know",
    "A or B",
    "A and B",
    "A, B",
    "Both A and B",
    "Neither A nor B",
    "The answer is A or B.",
    "The answer is (A) or (B)",
    "the answer is a or b",
    "The answer is A, B",
    "banana or cherry",
    "A dog",
    "It is A dog",
    "The answer is a dog",
    "The answer is difficult",
    "None of the above",
    "I think B is the one that anybody would choose here",  # too far from the end; VLMEvalKit asks a model, too
    "It is not C",
    "I don't think it is C",
    "It is not a banana",
    "There is no banana",
    "C is wrong",
    "C isn't right",
    "Banana isn't right",
    "E",
    "Z",
    "AB",
    "",
    " ",
    "no",
]


@pytest.mark.parametrize("answer", UNREAD)
def test_refusals_two_letters_denials_and_articles_are_not_read(answer: str) -> None:
    assert read_option(answer, FRUIT) is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", "B"),
        ("(b)", "B"),
        ("Answer: b", "B"),
        ("B. banana, C. cherry", "B"),
        ("D is the correct choice because the picture shows dates", "D"),
        ("A banana", "B"),
        ("Answer: A banana", "B"),
        ("Answer: a banana, since it is yellow", "B"),
        ("Answer: A. banana", "A"),
        ("Answer: A dog", "A"),
        (
            "Answer: A banana.\nExplanation: the others aren't there, as far as anybody could tell from what is shown",
            "B",
        ),
        ("the answer is banana", "B"),
        ("the answer is cherry", "C"),
        ("`B`", "B"),
        ("B\n\nThe picture shows a date and an apple, and they are brown", "B"),
    ],
)
def test_more_is_read_where_the_meaning_is_plain(answer: str, letter: str) -> None:
    """VLMEvalKit asks a language model, or reads "A banana" and "answer is cherry" by their first letters."""
    assert can_infer(answer, FRUIT) in {None, answer[0], letter}
    assert read_option(answer, FRUIT) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("I cannot tell", None), ("I don't know", None), ("No.", "B"), ("no, sir", "B"), ("It knows", None)],
)
def test_an_option_is_read_as_words_of_their_own(answer: str, letter: str | None) -> None:
    """VLMEvalKit finds "no" in "cannot" and "know", and "2" in "12"."""
    assert read_option(answer, {"A": "Yes", "B": "No"}) == letter
    assert read_option("I see 12 cars", {"A": "2 cars", "B": "12 cars"}) == "B"
    assert read_option("It is 2.5 m", {"A": "2 m", "B": "5 m"}) is None
    assert read_option("\u8fd9\u662f\u9999\u8549", {"A": "\u82f9\u679c", "B": "\u9999\u8549"}) == "B"


def test_letters_that_are_no_options_are_not_read() -> None:
    options = {"A": "apple", "C": "cherry"}
    assert read_option("I think it is B", options) is None
    assert read_option("The answer is B", options) is None
    assert read_option("I think it is C", options) == "C"
    nine = {letter: f"choice {letter}{letter}" for letter in "ABCDEFGHI"}
    assert read_option("I think it is C", nine) == "C"  # the word I isn't the option I
    assert read_option("It is I", nine) == "I"


BEFORE = ["", "Answer: ", "I think it is ", "The answer is ", "It must be option ", "So, finally: ", "Choice ", "Yes, "]
AROUND = ["{}", "({})", "{}.", "**{}**", "[{}]", "{{{}}}", "{}:", "#{}", "{}!", r"\boxed{{{}}}"]
BEHIND = ["", " it is", ", I think", " because of its colour and of its shape", "\nof course", ". Indeed so"]


def test_phrases_are_read_as_vlmevalkit_reads_them() -> None:
    rng, read = random.Random(0), 0
    for _ in range(6000):
        letter = rng.choice("ABCD")
        what = letter if rng.random() < 0.6 else FRUIT[letter]
        answer = rng.choice(BEFORE) + rng.choice(AROUND).format(what) + rng.choice(BEHIND)
        expected, found = can_infer(answer, FRUIT, r"(?!\w)"), read_option(answer, FRUIT)
        if expected is not None:
            assert expected == found == letter, answer
            read += 1
        else:  # far from the end, or long; VLMEvalKit asks a language model, which would say the same
            assert found in (letter, None), answer
    assert read > 4000


def test_a_long_answer_is_not_searched_for_the_words_of_an_option() -> None:
    """Twice the options' own length at most, as VLMEvalKit: 22 letters here."""
    options = {"A": "apple", "B": "banana"}
    assert read_option("I see one banana, sir.", options) == "B"
    assert read_option("I see one banana, sir..", options) is None


@pytest.mark.parametrize("answer", ["A", "A.", "A. ", "A ", " A. \n", "a", "(A)", "A)", "A: ", "Answer: A", "A. B"])
def test_a_letter_alone_is_a_letter_even_where_a_choice_is_called_so(answer: str) -> None:
    assert read_letter(answer, ["B", "A"]) == "A"
    assert read_option(answer, {"A": "B", "B": "A"}) == "A"
    assert read_letter(answer.replace("A", "b").replace("a", "b"), ["B", "A"]) in ("B", None)
