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

    dropped: messages that were left out for the context's sake (1 for a document that was cut); placeholders: image
    tokens of each image; rng: of what is still drawn for it, the changes of its pictures.
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
        muted = {number for number, message in enumerate(messages) if message.get("weight") == 0}
        said = [
            token != chat.image_token_id and whose not in muted
            for token, whose in zip(tokens.input_ids, tokens.messages, strict=True)
        ]
    return _example(record, tokens.input_ids, said, len(record.messages) - len(messages), placeholders, rng)


def tokenise(record: Record, chat: ChatEncoder, placeholders: Sequence[int]) -> ChatTokens:
    """All of a record, however long it is. A document's text and images stand between the tokenizer's beginning and its
    end, without a template, and all its text is learned (Flamingo, section 2.5)."""
    if record.kind == "chat":
        return chat.encode(record.messages, placeholders)
    begin, end, image = chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id, chat.image_token_id
    ids = [] if begin is None else [begin]
    said = [False] * len(ids)
    counts = iter(placeholders)
    for part in record.messages[0]["content"]:
        shown = part["type"] == "image"
        assert image is not None
        more = [image] * next(counts) if shown else chat.encode_text(part["text"], inner=bool(ids))
        ids += more
        said += [not shown] * len(more)
    whose: list[int | None] = [0] * len(ids)
    return ChatTokens(ids, said, whose) if end is None else ChatTokens([*ids, end], [*said, True], [*whose, None])


def _encode_document(
    record: Record, chat: ChatEncoder, context: int, rng: np.random.Generator, placeholders: Sequence[int]
) -> Example:
    """What doesn't fit the context is left out from the end, images whole."""
    tokens = tokenise(record, chat, placeholders)
    places = [place for place, token in enumerate(tokens.input_ids) if token == chat.image_token_id]
    end, shown, before = min(context, len(tokens.input_ids)), 0, 0
    for count in placeholders:
        first, last = places[before], places[before + count - 1]
        if last >= end:
            end = min(end, first)
            break
        shown, before = shown + 1, before + count
    cut = int(end < len(tokens.input_ids))
    return _example(record, tokens.input_ids[:end], tokens.supervised[:end], cut, placeholders[:shown], rng)


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
    # a generator costs more on its way from a worker than all the rest of a row
    later = rng if images else None
    example = Example(ids, labels, images, record.where, dropped, tuple(placeholders), later)
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
