"""Who sees which image: slots for placeholders, and the keys that deep fusion attends to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm.configuration import CrossAttention
from vlm.visual import Visual


def index_media(
    input_ids: torch.Tensor,
    image_token_id: int,
    placeholders: Sequence[int],
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image slot of every token.

    input_ids: [B, T]; placeholders: image tokens that stand for each image, in reading order; position_ids: [B, T],
    where a 0 begins a new document (packing; without it a row is a document). Returns media_index [B, T], the latest
    image of the token's own document (1-based slot over the whole batch, 0 = none), and document_start [B, T], the
    first slot that belongs to its document. ValueError names both counts when placeholders and images don't match.
    """
    is_image = (input_ids == image_token_id).reshape(-1)
    found, needed = int(is_image.sum()), sum(placeholders)
    if found != needed:
        raise ValueError(
            f"the text has {found} image tokens, but its {len(placeholders)} images need {needed} "
            f"({list(placeholders[:8])}{' ...' if len(placeholders) > 8 else ''})"
        )
    seen = is_image.long().cumsum(0)
    ends = torch.tensor(list(placeholders), device=seen.device, dtype=torch.long).cumsum(0)
    slot = torch.where(seen > 0, torch.searchsorted(ends, seen) + 1, 0)  # [B * T]
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 0] = True
    if position_ids is not None:
        begins |= position_ids == 0
    before = torch.cat([slot.new_zeros(1), slot[:-1]])
    positions = torch.arange(slot.shape[0], device=slot.device)
    base = before[torch.where(begins.reshape(-1), positions, 0).cummax(0).values]  # slots of earlier documents
    media_index = torch.where(slot > base, slot, 0)
    return media_index.view_as(input_ids), (base + 1).view_as(input_ids)


@dataclass(frozen=True)
class MediaLayout:
    """Where each row's keys lie in the flat visual tokens, and which of them each token sees.

    index: [B, M] into the visual tokens, or None when row b simply owns tokens b*M .. (b+1)*M; visible: [B, 1, T, M];
    any_visible: [B, T, 1], False where a token sees no image at all.
    """

    index: torch.Tensor | None
    visible: torch.Tensor
    any_visible: torch.Tensor


@dataclass(frozen=True)
class Media:
    """The images of one forward on their way to the LM's layers."""

    visual: Visual
    layout: MediaLayout


def lay_out_media(
    media_index: torch.Tensor, document_start: torch.Tensor, lengths: Sequence[int], attend: str
) -> MediaLayout:
    """Gathers, for every row, the visual tokens of the images from its first to its last.

    media_index, document_start: [B, T] as `index_media` makes them; lengths: visual tokens of each image. A batch
    without any image in sight still gets one (masked) key, so that the vision path runs on every rank.
    """
    device = media_index.device
    absent = media_index == 0
    lowest = media_index if attend == "last" else torch.minimum(document_start, media_index)
    first = torch.where(absent, len(lengths) + 1, lowest).amin(1)  # [B]
    last = media_index.amax(1)
    rows = [range(low, high + 1) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    flat = [[i for slot in row for i in range(offsets[slot - 1], offsets[slot])] for row in rows]
    owner = [[slot for slot in row for _ in range(lengths[slot - 1])] for row in rows]
    width = max(1, *(len(row) for row in flat))
    whole = [i for row in flat for i in row] == list(range(len(rows) * width)) == list(range(offsets[-1]))
    index = torch.tensor([row + [0] * (width - len(row)) for row in flat], device=device)
    slots = torch.tensor([row + [-1] * (width - len(row)) for row in owner], device=device)[:, None, :]  # [B, 1, M]
    token = media_index[:, :, None]
    visible = slots == token if attend == "last" else (slots >= document_start[:, :, None]) & (slots <= token)
    visible &= ~absent[:, :, None]
    return MediaLayout(None if whole else index, visible[:, None], visible.any(-1, keepdim=True))


def gated_layer_indices(settings: CrossAttention, num_layers: int) -> list[int]:
    """Decoder layers that a gated block stands before: every `every`-th, counted as OpenFlamingo does."""
    return [i for i in range(num_layers) if (i + 1) % settings.every == 0]
