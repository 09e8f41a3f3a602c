"""A connector's linear layers as vLLM's kinds, so that tensor parallelism and LoRA reach them."""

from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from vlm.projector import LinearLayers


class ParallelLayers(LinearLayers):
    """cuts: whether pairs are cut over the ranks, which needs that what is between their layers can be dealt evenly."""

    def __init__(self, cuts: bool, prefix: str) -> None:
        self.cuts, self.prefix = cuts, prefix

    def whole(self, in_size: int, out_size: int, bias: bool = True) -> nn.Module:
        layer: nn.Module = ReplicatedLinear(in_size, out_size, bias=bias, prefix=self.prefix, return_bias=False)
        return layer

    def widen(self, in_size: int, out_size: int, bias: bool = True, parts: int = 1) -> nn.Module:
        if not self.cuts:
            return self.whole(in_size, out_size, bias)
        settings = {"bias": bias, "prefix": self.prefix, "return_bias": False}
        layer: nn.Module = (
            ColumnParallelLinear(in_size, out_size, **settings)
            if parts == 1
            else MergedColumnParallelLinear(in_size, [out_size // parts] * parts, **settings)
        )
        return layer

    def narrow(self, in_size: int, out_size: int, bias: bool = True) -> nn.Module:
        if not self.cuts:
            return self.whole(in_size, out_size, bias)
        layer: nn.Module = RowParallelLinear(in_size, out_size, bias=bias, prefix=self.prefix, return_bias=False)
        return layer
