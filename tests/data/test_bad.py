"""Broken rows, told of in few words."""

from data.bad import Bad, kinds, summarise
from vlm import UserError


def kind(reason: str) -> str:
    return Bad("", reason).kind


def test_reasons_are_grouped_by_kind() -> None:
    assert kind("image 'a b.png' is not in /x") == kind("image 'it\\'s.png' is not in /x") == "image … is not in /x"
    assert kind("message 3: an empty answer") == "message N: an empty answer"
    said = "the conversation doesn't end with an assistant's answer"
    assert kind(said) == said
    assert kind("/a/b 1.png: empty, not an image") == kind("/c/d.jpg: empty, not an image")


def test_the_most_frequent_reasons_are_told_with_their_first_rows() -> None:
    rows = [Bad(f"a:{n}", f"message {n}: an empty answer") for n in range(3)]
    rows += [Bad("a:9", "no messages"), Bad("a:10", "image 'x' is gone"), Bad("a:11", "no answer"), Bad("a:12", "odd")]
    assert list(map(len, kinds(rows).values())) == [3, 1, 1, 1, 1]
    assert summarise(rows) == (
        "3 x a:0: message 0: an empty answer; 1 x a:9: no messages; 1 x a:10: image 'x' is gone; and 2 other reasons"
    )
    assert summarise(rows[:2]) == "2 x a:0: message 0: an empty answer"


def test_a_reason_doesnt_say_again_where() -> None:
    assert Bad.of("a:1", UserError("a:1: no messages")) == Bad("a:1", "no messages")
    assert Bad.of("a:1", UserError("odd")) == Bad("a:1", "odd")
