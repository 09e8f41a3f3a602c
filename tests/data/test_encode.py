"""Rows to ids and labels: what is learned, what is dropped to fit, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encode import IGNORED, Example, TrainOn, encode_record
from data.records import IMAGE_PART, Record, text_part
from tests.processors import plain_processor
from vlm import UserError, VisionLanguageProcessor
from vlm.chat import ChatEncoder
from vlm.tokenization import IMAGE_TOKEN

PER_IMAGE = 3


@pytest.fixture(scope="module")
def processor(tiny_tokenizer: Any) -> VisionLanguageProcessor:
    return plain_processor(tiny_tokenizer, PER_IMAGE)


def record(*turns: tuple[int, str, str], system: str = "", captions: tuple[str, ...] = ()) -> Record:
    """turns: number of images, question, answer."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": [text_part(system)]}] if system else []
    images: list[Path] = []
    for count, question, answer in turns:
        images += [Path(f"{len(images) + n}.png") for n in range(count)]
        messages.append({"role": "user", "content": [*[IMAGE_PART] * count, text_part(question)]})
        messages.append({"role": "assistant", "content": [text_part(answer)]})
    return Record("rows.jsonl:3", tuple(messages), tuple(images), captions)


def encode(
    row: Record, processor: VisionLanguageProcessor, context: int = 512, train_on: TrainOn = "assistant", seed: int = 0
) -> Example:
    placeholders = [PER_IMAGE] * len(row.images)
    return encode_record(row, processor.chat, context, train_on, np.random.default_rng(seed), placeholders)


WORDS = st.text("abc ?<>|", min_size=1, max_size=8).filter(str.strip)
TURNS = st.lists(st.tuples(st.integers(0, 2), WORDS, WORDS), min_size=1, max_size=4)


@given(turns=TURNS, system=st.sampled_from(["", "be brief"]))
@settings(max_examples=60, deadline=None)
def test_labels_are_the_answers_and_their_ends_or_everything_but_images(
    processor: VisionLanguageProcessor, turns: list[tuple[int, str, str]], system: str
) -> None:
    row = record(*turns, system=system)
    image, end = processor.image_token_id, processor.tokenizer.eos_token_id
    assistant = encode(row, processor)
    everything = encode(row, processor, train_on="all")
    assert assistant.input_ids == everything.input_ids
    assert assistant.images == everything.images == row.images
    assert assistant.input_ids.count(image) == PER_IMAGE * len(row.images)
    for example in (assistant, everything):
        pairs = zip(example.input_ids, example.labels, strict=True)
        assert all(label in (token, IGNORED) for token, label in pairs)
        assert example.supervised == sum(label != IGNORED for label in example.labels[1:])
    learned = [label for label in assistant.labels if label != IGNORED]
    answers = [[*processor.chat.encode_text(answer), end] for _, _, answer in turns]
    assert learned == [token for answer in answers for token in answer]
    assert [label != IGNORED for label in everything.labels] == [token != image for token in everything.input_ids]


def test_several_captions_are_drawn_by_the_rows_own_generator(processor: VisionLanguageProcessor) -> None:
    captions = ("a red cube", "one cube", "a thing")
    row = record((1, "describe", captions[0]), captions=captions)
    drawn = []
    for seed in range(30):
        np.random.seed(seed)
        expected = captions[int(np.random.default_rng(seed).integers(3))]
        example = encode(row, processor, seed=seed)
        learned = [label for label in example.labels if label != IGNORED]
        assert processor.tokenizer.decode(learned[:-1]) == expected
        assert example == encode(row, processor, seed=seed)
        drawn.append(expected)
    assert set(drawn) == set(captions)
    one = record((1, "describe", captions[0]), captions=captions[:1])
    generator = np.random.default_rng(0)
    encode_record(one, processor.chat, 512, "assistant", generator, [PER_IMAGE])
    assert generator.random() == np.random.default_rng(0).random()  # nothing is drawn where there is no choice


@pytest.mark.parametrize("system", ["", "be brief"])
def test_whole_turns_are_dropped_from_the_end_until_the_row_fits(
    processor: VisionLanguageProcessor, system: str
) -> None:
    turns = [(1, "what is this", "a cube"), (0, "sure", "yes"), (2, "and these", "cones"), (0, "all", "no")]
    whole = [encode(record(*turns[:count], system=system), processor) for count in range(1, 5)]
    sizes = [len(example.input_ids) for example in whole]
    assert sizes == sorted(set(sizes))
    for context in range(sizes[0], sizes[-1] + 3):
        fits = max(count for count in range(4) if sizes[count] <= context)
        example = encode(record(*turns, system=system), processor, context)
        assert example == replace(whole[fits], dropped=2 * (3 - fits))
        assert len(example.images) == sum(count for count, _, _ in turns[: fits + 1])
        assert example.input_ids.count(processor.image_token_id) == PER_IMAGE * len(example.images)
    with pytest.raises(UserError, match=r"don't fit the context of"):
        encode(record(*turns, system=system), processor, sizes[0] - 1)


def test_a_row_that_never_fits_is_refused_with_its_tokens_counted(processor: VisionLanguageProcessor) -> None:
    row = record((3, "what", "a cube"), (0, "and", "a cone"))
    tokens = len(encode(record((3, "what", "a cube")), processor).input_ids)
    with pytest.raises(UserError) as error:
        encode(row, processor, context=8)
    assert str(error.value) == (f"rows.jsonl:3: {tokens} tokens (9 of them for 3 images) don't fit the context of 8")


def test_an_answer_of_a_megabyte_is_refused_and_not_cut(processor: VisionLanguageProcessor) -> None:
    row = record((0, "what", "cube " * 200_000))
    with pytest.raises(UserError, match=r"rows\.jsonl:3: \d+ tokens \(0 of them for 0 images\) don't fit"):
        encode(row, processor)
    short = encode(record((0, "what", "a cube"), (0, "more", "cube " * 200_000)), processor)
    assert short == replace(encode(record((0, "what", "a cube")), processor), dropped=2)


def test_what_the_template_or_tokenizer_refuses_is_named_by_its_line(processor: VisionLanguageProcessor) -> None:
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: .*surrogate"):
        encode(record((0, "what", "a \ud800 cube")), processor)
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    lossy = ChatEncoder(processor.tokenizer, template, IMAGE_TOKEN)
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: the chat template drops message 2 of 2"):
        encode_record(record((0, "what", "a cube")), lossy, 512, "assistant", np.random.default_rng(0))


def test_a_row_of_which_nothing_would_be_learned_is_refused(processor: VisionLanguageProcessor) -> None:
    template = "{% for m in messages %}{{ m.content[0].text | trim }}{% endfor %}"
    silent = ChatEncoder(processor.tokenizer, template, IMAGE_TOKEN)
    row = record((0, "what", " "))
    with pytest.raises(UserError, match=r"rows\.jsonl:3: no token of it would be learned"):
        encode_record(row, silent, 512, "assistant", np.random.default_rng(0))


@given(turns=TURNS)
@settings(max_examples=40, deadline=None)
def test_last_learns_the_last_answer_of_what_fits_and_nothing_else(
    processor: VisionLanguageProcessor, turns: list[tuple[int, str, str]]
) -> None:
    row = record(*turns)
    every, last = encode(row, processor), encode(row, processor, train_on="last")
    end = processor.tokenizer.eos_token_id
    learned = [label for label in last.labels if label != IGNORED]
    assert processor.tokenizer.decode(learned[:-1]) == turns[-1][2]
    assert learned[-1] == end
    assert [label for label in every.labels if label != IGNORED][-len(learned) :] == learned
    short = encode(row, processor, context=len(last.input_ids) - 1, train_on="last") if len(turns) > 1 else None
    if short is not None:
        kept = turns[: len(turns) - short.dropped // 2]
        assert processor.tokenizer.decode([label for label in short.labels if label != IGNORED][:-1]) == kept[-1][2]


def document(*parts: str | None) -> Record:
    """None stands for an image."""
    content = [IMAGE_PART if part is None else text_part(part) for part in parts]
    images = tuple(Path(f"{n}.png") for n in range(parts.count(None)))
    return Record("rows.jsonl:3", ({"role": "document", "content": content},), images, kind="document")


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_document_is_its_text_and_images_in_order_all_text_learned(
    processor: VisionLanguageProcessor, train_on: TrainOn
) -> None:
    parts = ("a cat ", None, " and <image> <|end|> a dog", None, None, "!")
    example = encode(document(*parts), processor, train_on=train_on)
    image, end = processor.image_token_id, processor.tokenizer.eos_token_id
    expected = [
        token for part in parts for token in ([image] * PER_IMAGE if part is None else processor.chat.encode_text(part))
    ]
    assert example.input_ids == [*expected, end]
    assert example.labels == [IGNORED if token == image else token for token in [*expected, end]]
    assert example.placeholders == (PER_IMAGE,) * 3
    assert processor.tokenizer.decode(processor.chat.encode_text(parts[2] or "")) == parts[2]


def test_a_document_begins_as_its_tokenizer_does(processor: VisionLanguageProcessor) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(processor.tokenizer)  # a shallow copy shares its special tokens
    tokenizer.bos_token = tokenizer.pad_token
    chat = ChatEncoder(tokenizer, None, IMAGE_TOKEN)
    made = encode_record(document("a"), chat, 9, "all", np.random.default_rng(0))
    assert (made.input_ids[0], made.labels[0]) == (tokenizer.bos_token_id, IGNORED)


@pytest.mark.parametrize("context", range(2, 30))
def test_a_document_that_does_not_fit_loses_its_end_and_no_image_is_cut(
    processor: VisionLanguageProcessor, context: int
) -> None:
    row = document("a cat ", None, " and a dog", None, "!")
    whole = encode(row, processor)
    cut = encode(row, processor, context=context)
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert len(cut.input_ids) <= context
    count = cut.input_ids.count(processor.image_token_id)
    assert (count, len(cut.images)) == (PER_IMAGE * len(cut.images), len(cut.placeholders))
    assert bool(cut.dropped) == (len(cut.input_ids) < len(whole.input_ids))


def test_an_answer_that_weighs_nothing_is_read_and_not_learned(processor: VisionLanguageProcessor) -> None:
    row = record((1, "a", "bbb"), (0, "c", "aca"))
    messages = list(row.messages)
    messages[1] = {**messages[1], "weight": 0}
    muted = replace(row, messages=tuple(messages))
    end = processor.tokenizer.eos_token_id
    assert encode(muted, processor).input_ids == encode(row, processor).input_ids
    for train_on, before in (("assistant", []), ("all", ["a", "c"])):
        learned = [label for label in encode(muted, processor, train_on=train_on).labels if label != IGNORED]
        said = processor.tokenizer.decode(learned)
        assert "aca" in said
        assert "bbb" not in said
        assert all(word in said for word in before)
    learned = [label for label in encode(muted, processor).labels if label != IGNORED]
    assert learned == [*processor.chat.encode_text("aca"), end]
    messages[3] = {**messages[3], "weight": 0}
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: no token of it would be learned"):
        encode(replace(row, messages=tuple(messages)), processor)
