"""The Perceiver resampler of Flamingo (Alayrac et al. 2022, section 3.1 and figure 5): patches -> N latents.

With `pool`, the latents read squares of patches, which may be what shows a whole object where a patch doesn't.
"""

import torch
from torch import nn

from vlm.configuration import Connector
from vlm.projector import LinearLayers, pool_squares

# Queries are normalized, so this is only what a latent weighs beside what it reads. At a deviation of 1 the pictures
# are a small part of the sum at first, and captions take twice as many steps to be learned.
LATENT_STD = 0.1


class FeedForward(nn.Sequential):
    """LayerNorm, widen, GELU, narrow; no biases, as in Flamingo's blocks."""

    def __init__(self, width: int, mult: int, linear: LinearLayers | None = None) -> None:
        linear = linear or LinearLayers()
        super().__init__(
            nn.LayerNorm(width),
            linear.widen(width, width * mult, bias=False),
            nn.GELU(),
            linear.narrow(width * mult, width, bias=False),
        )


class PerceiverAttention(nn.Module):
    """Latents attend to the patches and to themselves: keys and values come from [patches, latents]."""

    def __init__(self, width: int, heads: int, head_dim: int, linear: LinearLayers) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = linear.widen(width, heads * head_dim, bias=False)
        self.to_kv = linear.widen(width, 2 * heads * head_dim, bias=False, parts=2)
        self.to_out = linear.narrow(heads * head_dim, width, bias=False)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.norm_latents(latents)
        both = torch.cat([self.norm_media(media), latents], dim=1)
        query = self.to_q(latents).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [I, H, N, Dh]
        key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.to_kv(both).chunk(2, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class PerceiverLayer(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, ff_mult: int, linear: LinearLayers) -> None:
        super().__init__()
        self.attention = PerceiverAttention(width, heads, head_dim, linear)
        self.feed_forward = FeedForward(width, ff_mult, linear)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = latents + self.attention(media, latents)
        out: torch.Tensor = latents + self.feed_forward(latents)
        return out


class PerceiverResampler(nn.Module):
    """[I, P, in_size] patches -> [I, num_latents, out_size]. Without out_size the latents keep the encoder's width.

    `squares`: how many squares of patches (with a pool of 1, patches) the latents read of one image.
    """

    def __init__(
        self,
        settings: Connector,
        in_size: int,
        out_size: int | None,
        squares: int,
        linear: LinearLayers | None = None,
    ) -> None:
        super().__init__()
        linear = linear or LinearLayers()
        self.pool, self.pooling = settings.pool, settings.pooling
        merges = self.pool > 1 and self.pooling == "concat"
        self.merge = linear.whole(in_size * self.pool**2, in_size) if merges else nn.Identity()
        self.latents = nn.Parameter(torch.randn(settings.num_latents, in_size) * LATENT_STD)
        self.positions = (
            nn.Parameter(torch.randn(squares, in_size) * settings.position_std) if settings.position_std else None
        )
        self.layers = nn.ModuleList(
            PerceiverLayer(in_size, settings.heads, settings.head_dim, settings.ff_mult, linear)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(in_size)
        self.out = linear.whole(in_size, out_size) if out_size else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.merge(pool_squares(features, self.pool, self.pooling))
        if self.positions is not None:
            features = features + self.positions
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        out: torch.Tensor = self.out(self.norm(latents))
        return out
