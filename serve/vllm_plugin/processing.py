"""From a request's images to pixels and image tokens, by the project's own processor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from vlm.configuration import VisionLanguageConfig
from vlm.processing import VisionLanguageProcessor


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a model before it sees an image."""

    def get_hf_config(self) -> VisionLanguageConfig:
        config: VisionLanguageConfig = self.ctx.get_hf_config(VisionLanguageConfig)
        return config

    def get_hf_processor(self, **kwargs: object) -> VisionLanguageProcessor:
        if kwargs:
            raise ValueError(f"mm_processor_kwargs are not supported (got {', '.join(kwargs)})")
        processor: VisionLanguageProcessor = self.ctx.get_hf_processor(VisionLanguageProcessor)
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        layout = self.get_hf_config().image_tokens
        return {"image": layout.placeholders(*layout.largest)}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest images, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        height, width = self.info.get_hf_config().image_tokens.largest
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        return {"image": images}


class ImageProcessor(BaseMultiModalProcessor[ProcessingInfo]):
    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor = self.info.get_hf_processor(**hf_kwargs)
        return BatchFeature(processor.pixels(hf_data["images"]))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if "image_sizes" not in hf_inputs:
            return {}
        layout = self.info.get_hf_config().image_tokens
        views = torch.tensor([layout.views(height, width) for height, width in hf_inputs["image_sizes"].tolist()])
        tensors = {name: MultiModalFieldConfig.flat_from_sizes("image", views) for name in hf_inputs}
        return {**tensors, "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        token = config.image_token_id

        def tokens(index: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(index)
            return [token] * config.image_tokens.placeholders(size.height, size.width)

        return [PromptReplacement(modality="image", target=[token], replacement=tokens)]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Mapping[str, Any]) -> Any:
        marks = token_ids.count(self.info.get_hf_config().image_token_id)
        images = len(mm_prompt_updates.get("image", ()))
        if marks != images:  # a prompt that was cut, or that came as ids
            raise VLLMValidationError(f"the prompt has {marks} image tokens for {images} images", parameter="messages")
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)
