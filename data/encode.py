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

    dropped: messages that were left out for the context's sake; placeholders: image tokens of each image; rng: of what
    is still drawn for it, the changes of its pictures.
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
    said = _last_answer(tokens.supervised) if train_on == "last" else tokens.supervised
    labels = [
        token if (learned or train_on == "all") and token != chat.image_token_id else IGNORED
        for token, learned in zip(tokens.input_ids, said, strict=True)
    ]
    images = record.images[: len(placeholders)]
    example = Example(tokens.input_ids, labels, images, record.where, dropped, tuple(placeholders), rng)
    if example.supervised == 0:
        raise UserError(f"{record.where}: no token of it would be learned")
    return example


def _encode(where: str, messages: Sequence[Message], chat: ChatEncoder, placeholders: Sequence[int]) -> ChatTokens:
    try:
        return chat.encode(messages, placeholders)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _last_answer(supervised: Sequence[bool]) -> list[bool]:
    """The last of the stretches that are supervised, alone."""
    end = max((index for index, said in enumerate(supervised) if said), default=-1)
    start = max((index for index, said in enumerate(supervised[: end + 1]) if not said), default=-1)
    return [start < index <= end for index in range(len(supervised))]


def _count_images(message: Message) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _can_shorten(messages: list[Message]) -> bool:
    return len(messages) > 2 + (messages[0]["role"] == "system")
