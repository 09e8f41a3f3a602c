"""`VisionLanguageProcessor`: chats and images to tensors; one place for trainer, engines and transformers users."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase, ProcessorMixin

from vlm.chat import ChatEncoder
from vlm.errors import UserError
from vlm.settings import nearest
from vlm.tokenization import IMAGE_TOKEN

MAX_ASPECT = 50


class VisionLanguageProcessor(ProcessorMixin):
    """An image processor and a tokenizer, and how many image tokens stand for one image."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        placeholders_per_image: int = 1,
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.placeholders_per_image = placeholders_per_image
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template, **kwargs)

    @cached_property
    def chat(self) -> ChatEncoder:
        """Messages -> ids that know who said what."""
        return ChatEncoder(self.tokenizer, self.chat_template, self.image_token, self.placeholders_per_image)

    @property
    def shorter_edge(self) -> int | None:
        """Pixels of an image's shorter edge that the image processor keeps; None where it has its own rule."""
        return getattr(self.image_processor.size, "shortest_edge", None)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images -> pixel_values [I, 3, H, W]."""
        if self.shorter_edge and getattr(self.image_processor, "do_center_crop", False):
            images = [_middle(image) for image in images]
        pixel_values = self.image_processor(list(images), return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.asarray(pixel_values, dtype=np.float32))

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Rendered prompts and their images, as transformers calls it: image marks become image tokens."""
        texts = [text] if isinstance(text, str) else list(text or [])
        marked = [item.replace(self.image_token, self.image_token * self.placeholders_per_image) for item in texts]
        tensors = kwargs.pop("return_tensors", "pt")
        kwargs.pop("images_kwargs", None)
        data = dict(self.tokenizer(marked, return_tensors=tensors, **kwargs)) if texts else {}
        flat = _flatten(images)
        if flat:
            data["pixel_values"] = self.pixels(flat)
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def make_processor(
    tokenizer: PreTrainedTokenizerBase, image_size: int, placeholders: int, **image_settings: Any
) -> VisionLanguageProcessor:
    """A processor for a model put together here: CLIP's preprocessing at `image_size` unless told otherwise."""
    return VisionLanguageProcessor(
        image_processor=make_image_processor(image_size, **image_settings),
        tokenizer=tokenizer,
        placeholders_per_image=placeholders,
    )


def make_image_processor(image_size: int, **image_settings: Any) -> CLIPImageProcessorPil:
    """CLIP's preprocessing. UserError for a setting that it doesn't know, and would ignore."""
    known = get_type_hints(CLIPImageProcessorPil.valid_kwargs)
    for name in image_settings:
        if name not in known:
            raise UserError(f"model.image.{name}: unknown setting; {nearest(name, known)}")
    settings = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        **image_settings,
    }
    return CLIPImageProcessorPil(**settings)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a very long image. The centre crop keeps no more of it, and scaling all of it takes gigabytes."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _flatten(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    return [image for item in images for image in _flatten(item)]
