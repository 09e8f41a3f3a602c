"""`Visual`: what the images of a batch look like to the language model. The one currency between tower and LM."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch

T = TypeVar("T")
KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Visual:
    """Connector outputs of several images, ragged and flat, in the order of their placeholders.

    tokens: [S, D], all images one after another; lengths: tokens of each image (they sum to S); tiles: tiles of each
    image; keys: a content key for each (for caches); layers: per gated block its ready (key, value), [S, H, Dh] each.
    Image slots are numbered from 1; 0 means "no image". Rows of a batch, beams and copies may share a slot.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    tiles: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    layers: tuple[KeyValue, ...] = ()

    def __post_init__(self) -> None:
        if sum(self.lengths) != self.tokens.shape[0]:
            raise ValueError(
                f"{self.tokens.shape[0]} visual tokens, but the lengths {self.lengths} sum to another number"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> list[int]:
        """Index of each image's first token."""
        return [0, *accumulate(self.lengths)][:-1]

    def select(self, slots: Sequence[int]) -> "Visual":
        """The images in these slots (1-based), in this order; a slot may be named several times."""
        offsets = self.offsets
        rows = [row for slot in slots for row in range(offsets[slot - 1], offsets[slot - 1] + self.lengths[slot - 1])]
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        return Visual(
            tokens=self.tokens[index],
            lengths=tuple(self.lengths[slot - 1] for slot in slots),
            tiles=tuple(self.tiles[slot - 1] for slot in slots) if self.tiles else (),
            keys=tuple(self.keys[slot - 1] for slot in slots) if self.keys else (),
            layers=tuple((key[index], value[index]) for key, value in self.layers),
        )

    @staticmethod
    def concat(visuals: Sequence["Visual"]) -> "Visual":
        """One Visual with the images of all, in order. Keys, tiles and layers survive where every part has them."""
        if len(visuals) == 1:
            return visuals[0]
        complete = all(len(visual.layers) == len(visuals[0].layers) for visual in visuals)
        layers = zip(*(visual.layers for visual in visuals), strict=True) if complete else ()
        return Visual(
            tokens=torch.cat([visual.tokens for visual in visuals]),
            lengths=tuple(length for visual in visuals for length in visual.lengths),
            tiles=_joined([visual.tiles for visual in visuals]),
            keys=_joined([visual.keys for visual in visuals]),
            layers=tuple((torch.cat([kv[0] for kv in layer]), torch.cat([kv[1] for kv in layer])) for layer in layers),
        )

    def with_layers(self, layers: Sequence[KeyValue]) -> "Visual":
        return replace(self, layers=tuple(layers))


def _joined(parts: list[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(item for part in parts for item in part) if all(parts) else ()
