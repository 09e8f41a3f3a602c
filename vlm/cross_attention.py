"""Gated cross-attention (Flamingo, section 3.2 and figure 4), put before decoder layers of any causal LM.

The blocks live beside the LM and enter through forward pre-hooks, so the LM keeps its own module names: its saved keys
stay plain, LoRA finds its layers, and it can be swapped. What a block needs travels as an argument of the call, never
as state on a module, so requests can't leak into each other and recomputation sees what the first pass saw. Layers of
LMs that hand no arguments on (MPT, Falcon) find it in a variable of the calling thread, which recomputation would miss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from vlm.configuration import CrossAttention
from vlm.fusion import Media, MediaLayout, gated_layer_indices
from vlm.projector import LinearLayers
from vlm.resampler import FeedForward
from vlm.visual import KeyValue


class GatedCrossAttention(nn.Module):
    """x + tanh(attn_gate) * attention(x, media), then x + tanh(ff_gate) * feed_forward(x). Gates start at 0."""

    def __init__(
        self, settings: CrossAttention, width: int, media_width: int, linear: LinearLayers | None = None
    ) -> None:
        super().__init__()
        linear = linear or LinearLayers()
        inner = settings.heads * settings.head_dim
        self.head_dim = settings.head_dim
        self.zero_ffn_without_media = settings.ffn_without_media == "zero"
        self.norm = nn.LayerNorm(width)
        self.to_q = linear.widen(width, inner, bias=False)
        self.to_kv = linear.widen(media_width, 2 * inner, bias=False, parts=2)
        self.to_out = linear.narrow(inner, width, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = FeedForward(width, settings.ff_mult, linear)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def project(self, tokens: torch.Tensor) -> KeyValue:
        """Keys and values of visual tokens [S, D] -> two of [S, H, Dh]."""
        key, value = self.to_kv(tokens).chunk(2, dim=-1)
        return key.unflatten(-1, (-1, self.head_dim)), value.unflatten(-1, (-1, self.head_dim))

    def query(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] of the LM -> [..., H, Dh]."""
        query: torch.Tensor = self.to_q(self.norm(hidden))
        return query.unflatten(-1, (-1, self.head_dim))

    def fuse(self, hidden: torch.Tensor, attended: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        """attended: [..., H, Dh], what each token found; sees: [..., 1], False where it looked at no image."""
        found = self.to_out(attended.flatten(-2))
        hidden = hidden + self.attn_gate.tanh() * found.masked_fill(~sees, 0.0)
        fed = self.ff_gate.tanh() * self.feed_forward(hidden)
        if self.zero_ffn_without_media:
            fed = fed.masked_fill(~sees, 0.0)
        out: torch.Tensor = hidden + fed
        return out

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, ready: KeyValue | None, layout: MediaLayout
    ) -> torch.Tensor:
        """hidden: [B, T, D] of the LM; tokens: [S, Dv]; ready: their keys and values if already projected."""
        key, value = ready or self.project(tokens)
        if layout.index is None:
            key, value = (part.unflatten(0, (hidden.shape[0], -1)) for part in (key, value))
        else:
            key, value = key[layout.index], value[layout.index]  # [B, M, H, Dh]
        # softmax over nothing is undefined: tokens without an image look at everything, then their result is zeroed
        visible = layout.visible | ~layout.any_visible[:, None]
        attended = nn.functional.scaled_dot_product_attention(
            self.query(hidden).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=visible
        )
        return self.fuse(hidden, attended.transpose(1, 2), layout.any_visible)


def insert_blocks(
    decoder_layers: nn.ModuleList, settings: CrossAttention, width: int, media_width: int
) -> nn.ModuleDict:
    """Gated blocks for these decoder layers, hooked in; returned under the index of the layer each stands before."""
    blocks = nn.ModuleDict()
    gated = gated_layer_indices(settings, len(decoder_layers))
    for position, index in enumerate(gated):
        block = GatedCrossAttention(settings, width, media_width)
        blocks[str(index)] = block
        hook = partial(_attend_before_layer, block=block, position=position)
        decoder_layers[index].register_forward_pre_hook(hook, with_kwargs=True)
    for index in set(range(len(decoder_layers))) - set(gated):
        decoder_layers[index].register_forward_pre_hook(_drop_media, with_kwargs=True)
    return blocks


_under_way: ContextVar[Media | None] = ContextVar("media", default=None)


@contextmanager
def carried(media: Media | None) -> Iterator[None]:
    """While the LM runs, its layers find the images, though they aren't handed on to them."""
    before = _under_way.set(media)
    try:
        yield
    finally:
        _under_way.reset(before)


def _taken(layer: nn.Module, kwargs: dict[str, Any]) -> Media | None:
    handed: Media | None = kwargs.pop("media", None)
    media = handed or _under_way.get()
    if media is not None and handed is None and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            f"{type(layer).__name__} is not handed its images, so it can't run again in the backward pass: turn "
            "gradient checkpointing off"
        )
    return media


def _attend_before_layer(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    block: GatedCrossAttention,
    position: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    media = _taken(layer, kwargs)
    if media is None:
        if block.zero_ffn_without_media:
            return args, kwargs
        # Flamingo applies the feed-forward to text without images, too
        fed = block.ff_gate.tanh() * block.feed_forward(args[0])
        return (args[0] + fed, *args[1:]), kwargs
    ready = media.visual.layers[position] if media.visual.layers else None
    return (block(args[0], media.visual.tokens, ready, media.layout), *args[1:]), kwargs


def _drop_media(
    _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs.pop("media", None)
    return args, kwargs
