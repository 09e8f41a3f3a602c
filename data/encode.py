"""Record -> Example: ids, labels and images of one row, labels by structure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.pictures import ImageRef
from data.records import Message, Record, text_part
from vlm.chat import ChatEncoder, ChatTokens
from vlm.errors import UserError

IGNORED = -100  # the label that no loss counts
TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Example:
    """input_ids, labels: [T] (labels are the ids themselves where supervised, IGNORED elsewhere); images in order.

    dropped: messages that were left out for the context's sake.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[ImageRef, ...]
    where: str
    dropped: int = 0

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
    dropped = len(record.messages) - len(messages)
    labels = [
        token if (said or train_on == "all") and token != chat.image_token_id else IGNORED
        for token, said in zip(tokens.input_ids, tokens.supervised, strict=True)
    ]
    example = Example(tokens.input_ids, labels, record.images[: len(placeholders)], record.where, dropped)
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
