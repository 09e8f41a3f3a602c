"""`VisionLanguageModel` for vLLM: the project's tower and connector around vLLM's own language model."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from serve.vllm_plugin.linear import ParallelLayers
from serve.vllm_plugin.processing import DummyInputs, ImageProcessor, ProcessingInfo
from vlm.configuration import VisionLanguageConfig
from vlm.encoding import EncodesImages, make_connector
from vlm.modeling import PIXELS
from vlm.vision import VisionTower

TOWERS = ("vision_tower", "second_vision_tower")


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class VisionLanguageModel(nn.Module, EncodesImages, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """The tower is the same code and whole on every rank; connector and language model are cut over the ranks."""

    fusion: ClassVar[str] = "early"

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "image":
            raise ValueError(f"{modality} is not supported, only images are")
        return None  # the chat template writes it

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: VisionLanguageConfig = vllm_config.model_config.hf_config
        if config.fusion != self.fusion:
            raise ValueError(f"{config.fusion} fusion has another class here; start it by vlm serve --engine vllm")
        self.config = config
        # LoRA finds a token's adapter by its place, and a Perceiver's layers see other numbers of tokens each
        self.supports_tower_connector_lora = config.connector_settings.type == "mlp"
        vision: Any = config.vision_config
        text: Any = config.text_config
        marks: Any = self  # what the mixins bring is untyped
        marks.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=[config.image_token_id])
        with marks._mark_tower_model(vllm_config, "image"):
            self.vision_tower = VisionTower(vision, config.vision_feature_layer, config.vision_feature_select)
            width = self.vision_tower.feature_size
            self.second_vision_tower: VisionTower | None = None
            if config.second_vision_config is not None:
                second: Any = config.second_vision_config
                self.second_vision_tower = VisionTower(second, config.second_vision_feature_layer, "patch")
                width += self.second_vision_tower.feature_size
            keeps_width = config.fusion == "deep" and config.connector_settings.type == "perceiver"
            self.media_width = width if keeps_width else text.hidden_size
            self.multi_modal_projector = _connector(config, width, None if keeps_width else text.hidden_size)
        anyres = config.image_tokens.mode == "anyres"
        self.image_newline = nn.Parameter(torch.empty(self.media_width)) if anyres else None
        self.to(vllm_config.model_config.dtype)
        with marks._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=text,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """What `ImageProcessor` made of some images -> for each its tokens [N, D]."""
        given: dict[str, Any] = {name: value for name, value in kwargs.items() if name in PIXELS}
        visual = self.encode_images(**given)
        return list(visual.tokens.split(list(visual.lengths)))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        inputs_embeds = inputs_embeds if intermediate_tensors is None else None
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        held: dict[str, dict[str, torch.Tensor]] = {name: {} for name in TOWERS}

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for key, tensor in weights:
                part, _, rest = key.partition(".encoder.")
                if part in held:
                    held[part][rest] = tensor
                else:
                    yield key, tensor

        loaded: set[str] = AutoWeightsLoader(self).load_weights(others())
        for name, tensors in held.items():
            tower = getattr(self, name)
            if isinstance(tower, VisionTower):  # vLLM leaves it out where images are limited to none
                _fill(tower.encoder, tensors)
                loaded |= {f"{name}.{key}" for key, _ in tower.named_parameters()}
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="multi_modal_projector",
            tower_model=list(TOWERS),
        )

    def get_mm_lora_token_counts(self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> tuple[int, int]:
        """Vectors of an image (or, without one, of as many image tokens at most) in the towers and in the connector."""
        layout = self.config.image_tokens
        if mm_kwargs is None:
            views = num_mm_embeds * max(layout.views(*size) for size in ((1, 1), *layout.pinpoints))
        else:
            height, width = mm_kwargs["image_sizes"].data.tolist()
            views = layout.views(height, width)
        count = views * self.config.squares_per_view
        return count, count


def _fill(encoder: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Loads an encoder by transformers, which alone knows the names that its families have in files."""
    filled, report = type(encoder).from_pretrained(
        None, config=encoder.config, state_dict=tensors, dtype=encoder.dtype, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
        raise ValueError(f"the weights of the vision encoder don't fit: {', '.join(wrong[:5])}")
    encoder.load_state_dict(filled.state_dict())


def _connector(config: VisionLanguageConfig, in_size: int, out_size: int | None) -> nn.Module:
    settings = config.connector_settings
    ranks = get_tensor_model_parallel_world_size()
    between = [out_size or in_size] if settings.type == "mlp" else [settings.heads, in_size * settings.ff_mult]
    linear = ParallelLayers(all(size % ranks == 0 for size in between), "multi_modal_projector")
    return make_connector(config, in_size, out_size, linear)
