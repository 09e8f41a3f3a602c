import random

import pytest

from serve.detokenizer import MAX_WINDOW, Detokenizer, make_decode
from vlm.errors import UserError

TEXTS = [
    "plain words, and more.",
    "naïve café, ça va",
    "日本語と中文",
    "👩‍👩‍👧 families 🏳️‍🌈 flags",
    "tab\tnew\nline ",
    "a\u0301 x\ufffdy",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tiny_tokenizer, text):
    decode = make_decode(tiny_tokenizer)
    ids = tiny_tokenizer(text).input_ids
    stream = Detokenizer(decode)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    said = ""
    for piece in pieces:
        said += piece
        assert text.startswith(said)


def test_bytes_that_are_no_text_come_out_as_the_tokenizer_decodes_them(tiny_tokenizer):
    decode = make_decode(tiny_tokenizer)
    for seed in range(50):
        ids = random.Random(seed).choices(range(len(tiny_tokenizer)), k=40)
        stream = Detokenizer(decode)
        assert "".join(stream.push(token) for token in ids) + stream.finish() == decode(ids)


def test_endless_nonsense_is_let_through_in_bounded_pieces(tiny_tokenizer):
    half = tiny_tokenizer("é").input_ids[0]
    stream = Detokenizer(make_decode(tiny_tokenizer))
    said = [stream.push(half) for _ in range(4 * MAX_WINDOW)]
    assert len("".join(said)) > 3 * MAX_WINDOW
    assert len(stream._ids) <= 2 * MAX_WINDOW


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", (" t",), "one"),
        ("abababc", ("ababc",), "ab"),
        ("xxabcd", ("abcd", "bc"), "xxa"),
        ("ends early: ab", ("abc",), "ends early: ab"),
        ("日本語", ("本",), "日"),
        ("starts", ("s",), ""),
    ],
)
def test_stop_strings_are_cut_exactly_and_never_shown(tiny_tokenizer, text, stop, expected):
    stream = Detokenizer(make_decode(tiny_tokenizer), stop)
    said = ""
    for token in tiny_tokenizer(text).input_ids:
        said += stream.push(token)
        assert expected.startswith(said)
        if stream.stopped:
            break
    assert said + stream.finish() == expected
    assert stream.stopped == any(word in text for word in stop)


def test_text_that_can_not_become_a_stop_string_is_not_held_back(tiny_tokenizer):
    stream = Detokenizer(make_decode(tiny_tokenizer), ("###",))
    ids = tiny_tokenizer("Z#Q").input_ids
    assert [stream.push(token) for token in ids] == ["Z", "", "#Q"]


def test_special_tokens_are_not_text(tiny_tokenizer):
    stream = Detokenizer(make_decode(tiny_tokenizer))
    ids = [
        *tiny_tokenizer("a").input_ids,
        tiny_tokenizer.convert_tokens_to_ids("<image>"),
        *tiny_tokenizer("b").input_ids,
    ]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "ab"


def test_slow_tokenizers_are_refused():
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        make_decode(object())
