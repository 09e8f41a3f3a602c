"""Record -> Example: ids, labels and images of one row, labels by structure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

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
    images: tuple[Path, ...]
    where: str
    dropped: int = 0

    @property
    def supervised(self) -> int:
        """Tokens that the loss counts; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode_record(
    record: Record, chat: ChatEncoder, context: int, train_on: TrainOn, rng: np.random.Generator
) -> Example:
    """The record as tokens. Whole turns are dropped from the end until it fits `context`; images are never cut.

    UserError with file:line when even the first turn doesn't fit, or when nothing in the row is supervised.
    """
    messages = list(record.messages)
    if len(record.captions) > 1:
        caption = record.captions[int(rng.integers(len(record.captions)))]
        messages[-1] = {"role": "assistant", "content": [text_part(caption)]}
    tokens = _encode(record.where, messages, chat)
    while len(tokens.input_ids) > context and _can_shorten(messages):
        messages = messages[:-2]
        tokens = _encode(record.where, messages, chat)
    if len(tokens.input_ids) > context:
        raise UserError(
            f"{record.where}: {len(tokens.input_ids)} tokens ({tokens.num_images * chat.placeholders} of them for "
            f"{tokens.num_images} images) don't fit the context of {context}"
        )
    dropped = len(record.messages) - len(messages)
    labels = [
        token if (said or train_on == "all") and token != chat.image_token_id else IGNORED
        for token, said in zip(tokens.input_ids, tokens.supervised, strict=True)
    ]
    example = Example(tokens.input_ids, labels, record.images[: tokens.num_images], record.where, dropped)
    if example.supervised == 0:
        raise UserError(f"{record.where}: no token of it would be learned")
    return example


def _encode(where: str, messages: Sequence[Message], chat: ChatEncoder) -> ChatTokens:
    try:
        return chat.encode(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _can_shorten(messages: list[Message]) -> bool:
    return len(messages) > 2 + (messages[0]["role"] == "system")
