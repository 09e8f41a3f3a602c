"""The MLP projector of LLaVA (Liu et al. 2023, section 4.1; two layers since 1.5), over patches or squares of them."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from vlm.configuration import Connector


class LinearLayers:
    """Makes a connector's linear layers. An engine that cuts layers over devices puts its own kinds in their place.

    A pair of layers with only elementwise work (or attention by heads) between them can be cut without exchanging
    anything in the middle: `widen` along its outputs, in each of `parts` equal parts, `narrow` along its inputs.
    """

    def whole(self, in_size: int, out_size: int, bias: bool = True) -> nn.Module:
        return nn.Linear(in_size, out_size, bias=bias)

    def widen(self, in_size: int, out_size: int, bias: bool = True, parts: int = 1) -> nn.Module:
        return self.whole(in_size, out_size, bias)

    def narrow(self, in_size: int, out_size: int, bias: bool = True) -> nn.Module:
        return self.whole(in_size, out_size, bias)


class MLPProjector(nn.Module):
    """[I, P, in_size] patches -> [I, squares, out_size]; `layers.0`, `layers.2` ... are the linear ones."""

    def __init__(self, settings: Connector, in_size: int, out_size: int, linear: LinearLayers | None = None) -> None:
        super().__init__()
        self.pool, self.pooling = settings.pool, settings.pooling
        if self.pooling == "concat":
            in_size *= self.pool**2
        linear = linear or LinearLayers()
        layers: list[nn.Module] = []
        for index in range(settings.depth):
            if index:
                layers.append(ACT2FN[settings.activation])
            alone = index % 2 == 0 and index == settings.depth - 1
            make = linear.whole if alone else (linear.widen, linear.narrow)[index % 2]
            layers.append(make(out_size if index else in_size, out_size, settings.bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.layers(pool_squares(features, self.pool, self.pooling))
        return projected


def pool_squares(features: torch.Tensor, pool: int, pooling: str) -> torch.Tensor:
    """[I, P, D] patches of a square grid -> [I, squares, D or D * pool^2]: each averaged, or side by side."""
    if pool == 1:
        return features
    side = round(features.shape[1] ** 0.5)
    if side * side != features.shape[1]:
        raise ValueError(f"pooling needs a square grid of patches, got {features.shape[1]} (leave out the class token)")
    grid = features.transpose(1, 2).unflatten(2, (side, side))  # [I, D, side, side]
    if pooling == "concat":
        missing = -side % pool  # squares at the right and lower edge are filled up with zeros
        grid = nn.functional.pixel_unshuffle(nn.functional.pad(grid, (0, missing, 0, missing)), pool)
    else:
        grid = nn.functional.avg_pool2d(grid, pool, ceil_mode=True)
    return grid.flatten(2).transpose(1, 2).contiguous()  # kernels of engines want it so
