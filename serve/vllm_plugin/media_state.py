"""What a request of a deep-fusion model keeps of its images, in vLLM's cache, and who looks at what in a step.

To vLLM each gated block is a layer with a state of constant size beside the cache of attention, as in Mamba models. So
its scheduler, preemption and chunked prefill work as they do there: a request that is thrown out begins anew, and its
state with it.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import AttentionSpec

from serve.vllm_plugin.looks import Requests
from serve.vllm_plugin.names import MEDIA_OPERATION
from vlm.visual import KeyValue

Shapes = tuple[tuple[int, ...], ...]


class RequestsBuilder(AttentionMetadataBuilder[Requests]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Requests:
        step = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        blocks = mamba_get_block_table_tensor(step.block_table_tensor, step.seq_lens, self.kv_cache_spec, mode)
        lengths = step.query_start_loc.diff()
        return Requests(blocks[: step.num_reqs, 0].long(), step.query_start_loc_cpu.tolist(), step.seq_lens == lengths)


class MediaBackend(AttentionBackend):
    """Registered with vLLM as its custom backend of layers with a state."""

    @staticmethod
    def get_name() -> str:
        return "VLM_MEDIA"

    @staticmethod
    def get_builder_cls() -> type[RequestsBuilder]:
        return RequestsBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class MediaState(nn.Module, MambaBase):
    """Keys and values of a request's visual tokens for one gated block, and whose they are.

    State: keys and values [slots, M, H, Dh]; owners [slots, M], 1 for tokens of the request's first image and so on, 0
    where there is none (kept by the first block for all).
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.shapes, self.dtype, self.prefix = shapes, dtype, prefix
        self.kv_cache: tuple[torch.Tensor, ...] = (torch.tensor([]),)  # keys, values, owners once vLLM has bound them

    def get_state_shape(self) -> Shapes:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def clear(self, requests: Requests) -> None:
        """Requests that begin may have got the place of one whose numbers ran over, which no mask holds back."""
        begins = requests.slots[requests.begins]
        for part in self.kv_cache[:2]:
            part[begins] = 0.0

    def write(self, requests: Requests, place: tuple[torch.Tensor, torch.Tensor], ready: KeyValue) -> None:
        """place: (request, column) [S] each, as `looks.enter` finds them; ready: two of [S, H, Dh]."""
        request, column = place
        for part, new in zip(self.kv_cache[:2], ready, strict=True):
            part[requests.slots[request], column] = new

    def attend(self, query: torch.Tensor, requests: Requests) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H, Dh] -> what each token found [T, H, Dh], and whether it saw an image [T, 1]."""
        attended, sees = torch.zeros_like(query), query.new_zeros(len(query), 1, dtype=torch.bool)
        keys, values, _ = self.kv_cache
        for look in requests.looks:
            slots, width = requests.slots[look.requests], look.mask.shape[-1]
            key, value = (part[slots, :width].transpose(1, 2) for part in (keys, values))  # [R, H, M, Dh]
            found = nn.functional.scaled_dot_product_attention(
                query[look.tokens].transpose(1, 2), key, value, attn_mask=look.mask
            )
            attended[look.tokens] = found.transpose(1, 2)
            sees[look.tokens] = look.sees
        return attended, sees


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return dtype, dtype, torch.int32


def attend_to_media(query: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An operation to the compiler, which would else freeze what it saw of the first step."""
    context = get_forward_context()
    requests = (context.attn_metadata or {}).get(layer)
    if requests is None:  # a step without requests, by which vLLM measures or tunes
        return torch.zeros_like(query), query.new_zeros(len(query), 1, dtype=torch.bool)
    state: MediaState = context.no_compile_layers[layer]
    return state.attend(query, requests)


def _shapes_alone(query: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[0], 1, dtype=torch.bool)


direct_register_custom_op(MEDIA_OPERATION, attend_to_media, fake_impl=_shapes_alone)
