"""Examples -> Batch: padded, with every token's image slot and every image's pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from data.encode import IGNORED, Example
from vlm.fusion import index_media
from vlm.processing import VisionLanguageProcessor


@dataclass(frozen=True)
class Batch:
    """input_ids, labels, media_index, document_start: [B, T]; pixels: what the processor made of the images, if any.

    Padding is on the right, where a causal LM needs no mask. supervised: tokens the loss counts; tokens: real ones;
    shortened: file:line of the rows of which messages were dropped.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    media_index: torch.Tensor
    document_start: torch.Tensor
    pixels: dict[str, torch.Tensor]
    supervised: int
    tokens: int
    shortened: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        pixels = {name: value.to(device, non_blocking=True) for name, value in self.pixels.items()}
        return replace(self, **moved, pixels=pixels)


def collate_chat(
    examples: Sequence[Example], pictures: Sequence[Image.Image], processor: VisionLanguageProcessor
) -> Batch:
    """A batch for `VisionLanguageModel`; pictures: those of all examples, in order.

    Without any it gets a blank one that no token refers to: a rank that left out the vision path in a step would leave
    the others waiting for its gradients.
    """
    pad = processor.tokenizer.pad_token_id
    input_ids, labels = pad_rows(examples, 0 if pad is None else pad)
    media_index, document_start = index_media(input_ids, processor.image_token_id, processor.placeholders(pictures))
    pictures = pictures or [Image.new("RGB", (32, 32))]
    return Batch(
        input_ids,
        labels,
        media_index,
        document_start,
        processor.pixels(pictures),
        supervised=sum(example.supervised for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        shortened=tuple(example.where for example in examples if example.dropped),
    )


def collate_text(examples: Sequence[Example], pad: int) -> Batch:
    """A batch for a language model alone."""
    input_ids, labels = pad_rows(examples, pad)
    nothing = torch.zeros_like(input_ids)
    return Batch(
        input_ids,
        labels,
        nothing,
        nothing,
        {},
        supervised=sum(example.supervised for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        shortened=tuple(example.where for example in examples if example.dropped),
    )


def pad_rows(examples: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels [B, T], T the longest row's length."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return input_ids, labels
