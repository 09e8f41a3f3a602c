"""Processors without a model."""

from typing import Any

from transformers import CLIPImageProcessorPil

from vlm import VisionLanguageProcessor
from vlm.tiling import ImageTokens


def plain_processor(tokenizer: Any, per_image: int, edge: int = 32) -> VisionLanguageProcessor:
    """CLIP's preprocessing at `edge` pixels; every image is one view of `per_image` tokens."""
    return VisionLanguageProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        tokenizer=tokenizer,
        image_tokens=ImageTokens(per_view=per_image, side=0, view_size=edge),
    )
