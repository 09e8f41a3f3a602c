"""Deep fusion for vLLM: gated blocks before vLLM's own decoder layers, their images in states beside the cache."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import IsHybrid
from vllm.sequence import IntermediateTensors

from serve.vllm_plugin.deep_config import can_be_cut, state_shape
from serve.vllm_plugin.linear import ParallelLayers
from serve.vllm_plugin.looks import Requests, enter
from serve.vllm_plugin.media_state import MediaState, Shapes, state_dtypes
from serve.vllm_plugin.model import VisionLanguageModel
from vlm.configuration import CrossAttention, VisionLanguageConfig
from vlm.cross_attention import GatedCrossAttention
from vlm.fusion import gated_layer_indices


class ServedCrossAttention(GatedCrossAttention):
    """A gated block whose keys and values lie in vLLM's cache."""

    def __init__(
        self, settings: CrossAttention, width: int, media_width: int, layer: str, linear: ParallelLayers
    ) -> None:
        super().__init__(settings, width, media_width, linear)
        self.layer = layer  # that vLLM knows its state by

    def attend(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [T, D] of the LM, all requests' tokens of a step -> the same after this block."""
        attended, sees = torch.ops.vllm.attend_to_media(self.query(hidden), self.layer)
        return self.fuse(hidden, attended, sees)


class DeepVisionLanguageModel(VisionLanguageModel, IsHybrid):
    fusion: ClassVar[str] = "deep"
    supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: VisionLanguageConfig = self.config
        text: Any = config.text_config
        settings = config.cross_attention_settings
        shapes, dtype = self.get_mamba_state_shape_from_config(vllm_config), vllm_config.model_config.dtype
        cut = can_be_cut(config, get_tensor_model_parallel_world_size())
        layers = self.language_model.model.layers
        self.cross_attention = nn.ModuleDict()
        self.states: list[MediaState] = []
        for index in gated_layer_indices(settings, len(layers)):
            name = f"cross_attention.{index}"
            state = MediaState(shapes, dtype, name)
            vllm_config.compilation_config.static_forward_context[name] = state
            linear = ParallelLayers(cut, name)
            block = ServedCrossAttention(settings, text.hidden_size, self.media_width, name, linear)
            self.cross_attention[str(index)] = block
            self.states.append(state)
            layers[index].register_forward_pre_hook(partial(_attend_before_layer, block=block))
        self._new: tuple[list[torch.Tensor], torch.Tensor | None] = ([], None)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Shapes:
        return state_shape(vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config.model_config.dtype)

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """For each image one vector, all its visual tokens in a row, since one image token stands for it."""
        return [tokens.reshape(1, -1) for tokens in super().embed_multimodal(**kwargs)]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Image tokens are embedded as words are; the images themselves wait for `forward`, which follows."""
        self._new = (list(multimodal_embeddings or ()), is_multimodal)
        embeds: torch.Tensor = self.language_model.embed_input_ids(input_ids)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        (images, is_image), self._new = self._new, ([], None)
        found: Any = get_forward_context().attn_metadata
        if found and self.states[0].prefix in found:  # vLLM also makes steps without requests
            self._take_in(images, is_image, found)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _take_in(self, images: list[torch.Tensor], is_image: torch.Tensor | None, found: dict[str, Requests]) -> None:
        """Writes the images that come with this step to the states, and leaves word of what each token sees."""
        owners = self.states[0].kv_cache[2]
        requests = found[self.states[0].prefix]
        tokens = [image.view(-1, self.media_width) for image in images]
        if is_image is None:
            is_image = torch.zeros(requests.starts[-1], dtype=torch.bool)
        attend = self.config.cross_attention_settings.attend
        place, looks = enter(owners, requests, is_image.to(owners.device), [len(t) for t in tokens], attend)
        for block, state in zip(self.cross_attention.values(), self.states, strict=True):
            own: Requests = found[state.prefix]
            own.looks = looks
            state.clear(own)
            if tokens:
                assert isinstance(block, ServedCrossAttention)
                state.write(own, place, block.project(torch.cat(tokens)))


def _attend_before_layer(_layer: nn.Module, args: tuple[Any, ...], *, block: ServedCrossAttention) -> tuple[Any, ...]:
    positions, hidden, residual, *rest = args
    return (positions, block.attend(hidden if residual is None else hidden + residual), None, *rest)
