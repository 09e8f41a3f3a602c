"""How the examples of a look-ahead window become rows of batches: as they come, by length, or packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.encode import Example
from vlm.settings import Count


@dataclass(frozen=True)
class Packing:
    """none: rows as they come, padded. bucket: rows of like length, with and without images apart, padded. pack:
    several documents in a row, which keep their own positions, attention and images.

    tokens: what a packed row holds (default: the context); images: most images in a packed row, unless one document has
    more (default: one for every 64 tokens, and 8 at least); window: examples that are looked at together.
    """

    mode: Literal["none", "bucket", "pack"] = "none"
    tokens: Count | None = None
    images: Count | None = None
    window: Count = 1024

    def most_images(self, tokens: int) -> int:
        """Images that a packed row of `tokens` may have."""
        return self.images or max(8, tokens // 64)


def plan(
    examples: Sequence[Example], packing: Packing, tokens: int, together: int, rng: np.random.Generator
) -> list[list[Example]]:
    """Rows, each a list of documents, every example in exactly one of them.

    tokens: room of a packed row; together: rows that will be padded to one length; rng: shuffles what was sorted, so
    that long rows don't come first.
    """
    if packing.mode == "none":
        return [[example] for example in examples]
    if packing.mode == "pack":
        lengths = [len(example.input_ids) for example in examples]
        images = [len(example.images) for example in examples]
        rows = pack(lengths, images, tokens, packing.most_images(tokens))
        return [[examples[index] for index in rows[number]] for number in rng.permutation(len(rows))]
    order = sorted(range(len(examples)), key=lambda i: (bool(examples[i].images), len(examples[i].input_ids)))
    groups = [order[start : start + together] for start in range(0, len(order), together)]
    # a group that isn't full stays last: before others it would shift the borders of theirs
    shuffled = [*rng.permutation(len(groups) - 1).tolist(), len(groups) - 1] if groups else []
    return [[examples[index]] for number in shuffled for index in groups[number]]


def pack(lengths: Sequence[int], images: Sequence[int], tokens: int, most_images: int) -> list[list[int]]:
    """First-fit decreasing (Johnson 1973): numbers of the documents in each row.

    A row has at most `tokens` tokens and `most_images` images; a document beyond either gets a row to itself.
    """
    count = len(lengths)
    room = np.zeros(count, dtype=np.int64)
    room_for_images = np.zeros(count, dtype=np.int64)
    rows: list[list[int]] = []
    for index in sorted(range(count), key=lambda i: -lengths[i]):
        fits = (room[: len(rows)] >= lengths[index]) & (room_for_images[: len(rows)] >= images[index])
        number = int(fits.argmax()) if fits.any() else len(rows)
        if number == len(rows):
            rows.append([])
            room[number], room_for_images[number] = tokens, most_images
        rows[number].append(index)
        room[number] -= lengths[index]
        room_for_images[number] -= images[index]
    return rows
