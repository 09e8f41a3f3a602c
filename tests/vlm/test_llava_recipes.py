"""The supplied templates of LLaVA teach what LLaVA's own code does, with the old and the new kind of Llama tokenizer.

The oracles say in words of our own what llava/mm_utils.py (tokenizer_image_token) and llava/train/train.py
(preprocess_v1, preprocess_plain) do, with nothing but SentencePiece.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from vlm.chat import ChatEncoder
from vlm.convert.sources import read_tokenizer
from vlm.templates import find_template, fit_template
from vlm.tokenization import IMAGE_TOKEN, add_image_token

IGNORED = -100
IMAGE = -200
BEGIN, END = 1, 2
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "new"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, bool]:
    """The tokenizer as we read it, SentencePiece, and whether it is legacy."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("llama")
    words = f"{SYSTEM} USER: what is this? how many are there? ASSISTANT: a cat on a mat. yes no red"
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([words] * 20),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = read_tokenizer(folder)
    add_image_token(tokenizer)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), request.param


def pieces(slow: Any, text: str, legacy: bool) -> list[int]:
    """A Llama tokenizer's ids without a beginning: </s> is a token, and what follows it is read as if it stood alone
    (legacy: with a space before it), or as it is."""
    ids: list[int] = []
    for number, part in enumerate(text.split("</s>")):
        ids += [END] * (number > 0)
        if not part:
            continue
        if legacy or number == 0:
            ids += slow.encode(part)
        else:  # without the space that SentencePiece puts before a text: read behind a character of one token
            before = slow.encode("\x01")
            ids += slow.encode("\x01" + part)[len(before) :]
    return ids


def with_images(encode: Encode, text: str) -> list[int]:
    """tokenizer_image_token: stretches between images are tokenised alone, one beginning before all."""
    ids = [BEGIN]
    for number, part in enumerate(text.split("<image>")):
        ids += [IMAGE] * (number > 0) + encode(part)
    return ids


def preprocess_v1(encode: Encode, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    rounds = [f"USER: {asked} ASSISTANT: {said}" for asked, said in turns]
    rounds[0] = f"{SYSTEM} {rounds[0]}"
    ids = with_images(encode, "".join(one + "</s>" for one in rounds))
    labels = [*ids]
    labels[0] = IGNORED
    place = 1
    for one in rounds:
        length = len(with_images(encode, one))
        instruction = len(with_images(encode, one.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 2
        labels[place : place + instruction] = [IGNORED] * instruction
        place += length
    assert place == len(ids), "LLaVA would mask all of it: tokenization mismatch"
    return ids, labels


def preprocess_plain(encode: Encode, caption: str) -> tuple[list[int], list[int]]:
    ids = with_images(encode, f"<image>{caption}\n")
    shown = len(with_images(encode, "<image>"))
    return ids, [IGNORED] * shown + ids[shown:]


def ours(tokenizer: Any, name: str, turns: list[tuple[str, str]], images: int) -> tuple[list[int], list[int]]:
    encoder = ChatEncoder(tokenizer, fit_template(find_template(name), tokenizer, IMAGE_TOKEN), IMAGE_TOKEN)
    chat: list[dict[str, Any]] = []
    for number, (asked, said) in enumerate(turns):
        shown = [{"type": "image"}] * images * (number == 0)
        text = asked.removeprefix("<image>\n")
        chat.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    tokens = encoder.encode(chat, [1] * images)
    image = encoder.image_token_id
    ids = [IMAGE if token == image else token for token in tokens.input_ids]
    return ids, [token if on else IGNORED for token, on in zip(ids, tokens.supervised, strict=True)]


ANSWERS = ["7", "yes", "no", "red", "a cat", "A.", "(x)", "12", "I see 3 cats.", "B", "é", "two\nlines", "1+1"]
ASKED = ["what is this?", "how many?", "is it 3?", "Answer with a word.\nA. cat\nB. mat"]


def test_conversations_have_the_ids_and_labels_of_preprocess_v1(llama: tuple[Any, Any, bool]) -> None:
    tokenizer, slow, legacy = llama
    rng = random.Random(0)
    lone = 0
    for _ in range(200):
        # its arithmetic for the later turns of the new kind holds for Llama's own vocabulary alone
        turns = [(rng.choice(ASKED), rng.choice(ANSWERS)) for _ in range(rng.randint(1, 3 if legacy else 1))]
        images = rng.randint(0, 1)
        if images:
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        expected = preprocess_v1(lambda text: pieces(slow, text, legacy), turns)
        assert ours(tokenizer, "vicuna_v1", turns, images) == expected, turns
        lone += expected[1].count(slow.piece_to_id("▁"))
    assert lone > 50  # the space that a short answer begins with is a token of its own, and learned


def test_captions_have_the_ids_and_labels_of_preprocess_plain(llama: tuple[Any, Any, bool]) -> None:
    tokenizer, slow, legacy = llama
    rng = random.Random(1)
    for _ in range(100):
        caption = " ".join(rng.choice(ANSWERS) for _ in range(rng.randint(1, 4)))
        expected = preprocess_plain(lambda text: pieces(slow, text, legacy), caption)
        assert ours(tokenizer, "plain", [("<image>", caption)], 1) == expected, caption
        assert expected[1][-1] == slow.encode("a\n")[-1] != END
