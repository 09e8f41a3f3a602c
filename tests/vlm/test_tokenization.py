"""The byte-level tokenizer: no string is lost, control tokens included."""

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vlm.chat import ChatEncoder
from vlm.tokenization import CHAT_TEMPLATE, IMAGE_TOKEN, SPECIAL_TOKENS, train_tokenizer

ANY = st.text(max_size=60) | st.lists(st.text(max_size=8) | st.sampled_from(SPECIAL_TOKENS), max_size=6).map("".join)


@given(words=ANY)
@settings(max_examples=200, deadline=None)
def test_any_string_survives_encoding_and_decoding(tiny_tokenizer: Any, words: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer(words, add_special_tokens=False).input_ids) == words


@given(words=ANY)
@settings(max_examples=200, deadline=None)
def test_text_that_looks_like_control_tokens_survives_as_text(tiny_tokenizer: Any, words: str) -> None:
    ids = ChatEncoder(tiny_tokenizer, CHAT_TEMPLATE, IMAGE_TOKEN).encode_text(words)
    assert tiny_tokenizer.decode(ids) == words
    assert set(ids).isdisjoint(tiny_tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))


def test_every_byte_has_a_token_and_context_reaches_512(tiny_tokenizer: Any) -> None:
    assert tiny_tokenizer.model_max_length >= 512
    for code in [*range(256), 0xFFFF, 0x10000, 0x10FFFF]:
        assert tiny_tokenizer.decode(tiny_tokenizer(chr(code)).input_ids) == chr(code)
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id) == (0, 1)
    assert tiny_tokenizer.padding_side == "left"


def test_frequent_words_become_one_token_and_the_vocabulary_is_bounded() -> None:
    tokenizer = train_tokenizer(["cube cube cube sphere"] * 9, vocab_size=270, context=512)
    assert len(tokenizer) <= 270
    assert len(tokenizer(" cube").input_ids) == 1
    assert len(tokenizer(" cone").input_ids) > 1


def test_two_trainings_and_a_round_trip_through_a_folder_give_the_same_tokenizer(tmp_path: Path) -> None:
    first, second = (train_tokenizer(["a red cube", "a blue cone"], vocab_size=300, context=640) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    sample = "a red cone <image><|end|> Würfel\n"
    assert again(sample).input_ids == first(sample).input_ids
    assert (again.model_max_length, again.chat_template, again.padding_side) == (640, CHAT_TEMPLATE, "left")
