"""Record -> Example: ids, labels and images of one row, labels by structure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data.pictures import ImageRef
from data.records import Message, Record, text_part
from vlm.chat import ChatEncoder, ChatTokens
from vlm.errors import UserError

IGNORED = -100  # the label that no loss counts
TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Example:
    """input_ids, labels: [T] (labels are the ids themselves where supervised, IGNORED elsewhere); images in order.

    dropped: messages (or parts of a document) that were left out for the context's sake; placeholders: image tokens of
    each image; rng: of what is still drawn for it, the changes of its pictures.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[ImageRef, ...]
    where: str
    dropped: int = 0
    placeholders: tuple[int, ...] = ()
    rng: np.random.Generator | None = field(default=None, repr=False, compare=False)

    @property
    def supervised(self) -> int:
        """Tokens that the loss counts; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode_record(
    record: Record,
    chat: ChatEncoder,
    context: int,
    train_on: TrainOn,
    rng: np.random.Generator,
    placeholders: Sequence[int] = (),
) -> Example:
    """The record as tokens. Whole turns are dropped from the end until it fits `context`; images are never cut.

    placeholders: image tokens that stand for each of its images. UserError with file:line when even the first turn
    doesn't fit, or when nothing in the row is supervised.
    """
    if record.kind == "document":
        return _encode_document(record, chat, context, rng, placeholders)
    messages = list(record.messages)
    if len(record.captions) > 1:
        caption = record.captions[int(rng.integers(len(record.captions)))]
        messages[-1] = {"role": "assistant", "content": [text_part(caption)]}
    tokens = _encode(record.where, messages, chat, placeholders)
    while len(tokens.input_ids) > context and _can_shorten(messages):
        messages = messages[:-2]
        placeholders = placeholders[: sum(map(_count_images, messages))]
        tokens = _encode(record.where, messages, chat, placeholders)
    if len(tokens.input_ids) > context:
        raise UserError(
            f"{record.where}: {len(tokens.input_ids)} tokens ({sum(placeholders)} of them for {len(placeholders)} "
            f"images) don't fit the context of {context}"
        )
    said = tokens.supervised
    if train_on == "last":
        last = len(messages) - 1
        said = [learned and whose == last for learned, whose in zip(said, tokens.messages, strict=True)]
    elif train_on == "all":
        said = [token != chat.image_token_id for token in tokens.input_ids]
    return _example(record, tokens.input_ids, said, len(record.messages) - len(messages), placeholders, rng)


def _encode_document(
    record: Record, chat: ChatEncoder, context: int, rng: np.random.Generator, placeholders: Sequence[int]
) -> Example:
    """Text and images as they stand, between the tokenizer's beginning and its end, without a template (Flamingo,
    section 2.5). All its text is learned; what doesn't fit the context is left out from the end, images whole."""
    tokenizer = chat.tokenizer
    ids: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    said = [False] * len(ids)
    shown, left_out = 0, 0
    for part in record.messages[0]["content"]:
        if part["type"] == "image":
            assert chat.image_token_id is not None
            more = [chat.image_token_id] * placeholders[shown]
        else:
            more = chat.encode_text(part["text"], inner=bool(ids))
        if left_out or (part["type"] == "image" and len(ids) + len(more) > context):
            left_out += 1
            continue
        shown += part["type"] == "image"
        left_out += len(ids) + len(more) > context
        ids = [*ids, *more][:context]
        said = [*said, *([part["type"] != "image"] * len(more))][:context]
    if not left_out and tokenizer.eos_token_id is not None and len(ids) < context:
        ids.append(tokenizer.eos_token_id)
        said.append(True)
    return _example(record, ids, said, left_out, placeholders[:shown], rng)


def _example(
    record: Record,
    ids: list[int],
    said: Sequence[bool],
    dropped: int,
    placeholders: Sequence[int],
    rng: np.random.Generator,
) -> Example:
    labels = [token if learned else IGNORED for token, learned in zip(ids, said, strict=True)]
    images = record.images[: len(placeholders)]
    example = Example(ids, labels, images, record.where, dropped, tuple(placeholders), rng)
    if example.supervised == 0:
        raise UserError(f"{record.where}: no token of it would be learned")
    return example


def _encode(where: str, messages: Sequence[Message], chat: ChatEncoder, placeholders: Sequence[int]) -> ChatTokens:
    try:
        return chat.encode(messages, placeholders)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _count_images(message: Message) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _can_shorten(messages: list[Message]) -> bool:
    return len(messages) > 2 + (messages[0]["role"] == "system")
