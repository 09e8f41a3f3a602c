"""Samples -> Batch: rows padded, with every token's position, image slot and document, and every image's pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from data.encode import IGNORED, Example
from vlm.documents import Span
from vlm.fusion import index_media
from vlm.processing import VisionLanguageProcessor

Pixels = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """An example and what `VisionLanguageProcessor.pixels` makes of its images; nothing where it has none."""

    example: Example
    pixels: Pixels = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """input_ids, labels, media_index, document_start: [B, T]; pixels: what the processor made of the images, if any.

    Padding is on the right, where a causal LM needs no mask. Packed rows have position_ids [B, T], 0 where a document
    begins, and `documents`. supervised: tokens the loss counts; tokens: real ones; shortened: file:line of the rows of
    which messages were dropped.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    media_index: torch.Tensor
    document_start: torch.Tensor
    pixels: Pixels
    supervised: int
    tokens: int
    shortened: tuple[str, ...] = ()
    position_ids: torch.Tensor | None = None
    documents: tuple[Span, ...] | None = None

    @property
    def room(self) -> int:
        """Tokens that are computed, padding included."""
        return self.input_ids.numel()

    @property
    def packed(self) -> dict[str, Any]:
        """What a language model must be told of packed rows."""
        return {} if self.documents is None else {"position_ids": self.position_ids, "documents": self.documents}

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        pixels = {name: value.to(device, non_blocking=True) for name, value in self.pixels.items()}
        return replace(self, **moved, pixels=pixels)


def collate_chat(rows: Sequence[Sequence[Sample]], processor: VisionLanguageProcessor, packed: bool = False) -> Batch:
    """A batch for `VisionLanguageModel`; without `packed` each row has one sample.

    Without any image it gets a blank one that no token refers to: a rank that left out the vision path in a step would
    leave the others waiting for its gradients.
    """
    pad = processor.tokenizer.pad_token_id
    samples = [sample for row in rows for sample in row]
    batch = collate_text([[sample.example for sample in row] for row in rows], 0 if pad is None else pad, packed)
    placeholders = [count for sample in samples for count in sample.example.placeholders]
    media_index, document_start = index_media(
        batch.input_ids, processor.image_token_id, placeholders, batch.position_ids
    )
    pixels = join_pixels([sample.pixels for sample in samples if sample.pixels])
    return replace(
        batch,
        media_index=media_index,
        document_start=document_start,
        pixels=pixels or processor.pixels([Image.new("RGB", (32, 32))]),
    )


def collate_text(rows: Sequence[Sequence[Example]], pad: int, packed: bool = False) -> Batch:
    """A batch for a language model alone."""
    examples = [example for row in rows for example in row]
    input_ids, labels = pad_rows(rows, pad)
    nothing = torch.zeros_like(input_ids)
    batch = Batch(
        input_ids,
        labels,
        nothing,
        nothing,
        {},
        supervised=sum(example.supervised for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        shortened=tuple(example.where for example in examples if example.dropped),
    )
    if not packed:
        return batch
    documents = find_documents([[len(example.input_ids) for example in row] for row in rows], input_ids.shape[1])
    positions = [torch.arange(end - start) for _, start, end in documents]
    return replace(batch, position_ids=torch.cat(positions).view_as(input_ids), documents=tuple(documents))


def pad_rows(rows: Sequence[Sequence[Example]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels [B, T], T the longest row's length; of no rows at all a row of one padding token."""
    length = max((sum(len(example.input_ids) for example in row) for row in rows), default=1)
    input_ids = torch.full((max(1, len(rows)), length), pad)
    labels = torch.full((max(1, len(rows)), length), IGNORED)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            input_ids[number, start:end] = torch.tensor(example.input_ids)
            # the first token of a document would be predicted from the last of the one before
            labels[number, start + 1 : end] = torch.tensor(example.labels[1:], dtype=torch.long)
            start = end
    return input_ids, labels


def find_documents(lengths: Sequence[Sequence[int]], width: int) -> list[Span]:
    """Where the documents of each row lie; what is left of a row is one, too, so that every token belongs to one."""
    documents: list[Span] = []
    for number, row in enumerate(lengths or [[]]):
        start = 0
        for length in (*row, width - sum(row)):
            if length:
                documents.append((number, start, start + length))
            start += length
    return documents


def join_pixels(parts: Sequence[Pixels]) -> Pixels:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def split_pixels(pixels: Pixels, views: Sequence[int], images: Sequence[int]) -> list[Pixels]:
    """The pixels of several samples, each with its own; views, images: how many each sample has of both."""
    counts = {name: images if name == "image_sizes" else views for name in pixels}
    parts = {name: value.split(list(counts[name])) for name, value in pixels.items()}
    return [
        {name: part[number] for name, part in parts.items()} if count else {} for number, count in enumerate(images)
    ]
