"""`VisionLanguageProcessor`: chats and images to tensors; one place for trainer, engines and transformers users."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vlm.chat import ChatEncoder
from vlm.configuration import VisionLanguageConfig
from vlm.encoders import make_image_processor, restore_image_processor
from vlm.settings import parse, plain
from vlm.tiling import ImageTokens, shorten
from vlm.tokenization import IMAGE_TOKEN

MAX_ASPECT = 50
LONGEST_PADDED = 8192  # of an image that is padded to a square: memory grows with the square of its longer edge
HUB_SETTINGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "trust_remote_code")


class VisionLanguageProcessor(ProcessorMixin):
    """A tokenizer, the preprocessing of each vision encoder, and how many image tokens stand for an image.

    image_tokens: `VisionLanguageConfig.image_tokens` of the model, or what `to_dict` made of it; second_preprocessing:
    the settings of the second encoder's image processor.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        image_tokens: ImageTokens | dict[str, Any] | None = None,
        second_preprocessing: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(image_tokens, ImageTokens):
            image_tokens = parse(ImageTokens, image_tokens or {}, "image_tokens")
        self.image_token, self.image_tokens = image_token, image_tokens
        self.second_preprocessing = second_preprocessing
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template, **kwargs)

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> "VisionLanguageProcessor":
        processor: VisionLanguageProcessor = super().from_pretrained(source, **kwargs)
        # where torchvision is installed transformers takes its other implementation, which scales pictures differently
        hub = {name: kwargs[name] for name in HUB_SETTINGS if name in kwargs}
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **hub)
        return processor

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_tokens": plain(asdict(self.image_tokens))}

    @cached_property
    def chat(self) -> ChatEncoder:
        """Messages -> ids that know who said what."""
        return ChatEncoder(self.tokenizer, self.chat_template, self.image_token)

    @cached_property
    def image_processors(self) -> dict[str, Any]:
        """For each encoder of the model, under the name of its tensor."""
        known = {"pixel_values": self.image_processor}
        if self.second_preprocessing is not None:
            known["second_pixel_values"] = restore_image_processor(self.second_preprocessing)
        return known

    @property
    def shorter_edge(self) -> int | None:
        """Pixels of an image's shorter edge that are kept; None where that depends on the image."""
        whole = self.image_tokens.mode == "none" and not getattr(self.image_processor, "do_pad", False)
        return getattr(self.image_processor.size, "shortest_edge", None) if whole else None

    def placeholders(self, images: Sequence[Image.Image]) -> list[int]:
        """Image tokens that stand for each of these images."""
        return [self.image_tokens.placeholders(image.height, image.width) for image in images]

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """RGB images -> pixel_values [V, 3, H, W] of all views, the same for a second encoder, image_sizes [I, 2]."""
        views = [view for image in images for view in self.image_tokens.cut(image)]
        made = {name: _preprocess(views, processor) for name, processor in self.image_processors.items()}
        return {**made, "image_sizes": torch.tensor([[image.height, image.width] for image in images])}

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Rendered prompts and their images, as transformers calls it: image marks become image tokens.

        ValueError when there are more or fewer marks than images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat = _flatten(images)
        tensors = kwargs.pop("return_tensors", "pt")
        kwargs.pop("images_kwargs", None)
        data = dict(self.tokenizer(self._expand(texts, flat), return_tensors=tensors, **kwargs)) if texts else {}
        return BatchFeature({**data, **self.pixels(flat)} if flat else data)

    def _expand(self, texts: Sequence[str], images: Sequence[Image.Image]) -> list[str]:
        pieces = [text.split(self.image_token) for text in texts]
        marks = sum(len(piece) - 1 for piece in pieces)
        if marks != len(images):
            raise ValueError(f"the text has {marks} {self.image_token} marks for {len(images)} images")
        counts = iter(self.placeholders(images))
        return [first + "".join(self.image_token * next(counts) + part for part in rest) for first, *rest in pieces]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processors, "image_sizes"]


def make_processor(
    config: VisionLanguageConfig,
    tokenizer: PreTrainedTokenizerBase,
    image: Mapping[str, Any] | None = None,
    second_image: Mapping[str, Any] | None = None,
) -> VisionLanguageProcessor:
    """A processor for a model: the preprocessing that each encoder was made for, but for these settings."""
    vision: Any = config.vision_config
    second: Any = config.second_vision_config
    return VisionLanguageProcessor(
        image_processor=make_image_processor(vision, image or {}),
        tokenizer=tokenizer,
        image_tokens=config.image_tokens,
        second_preprocessing=None if second is None else make_image_processor(second, second_image or {}).to_dict(),
    )


def _preprocess(views: Sequence[Image.Image], processor: Any) -> torch.Tensor:
    """[V, 3, H, W]"""
    if getattr(processor, "do_pad", False):
        views = [view.reduce(-(-max(view.size) // LONGEST_PADDED)) for view in views]
    elif getattr(processor.size, "shortest_edge", None) and getattr(processor, "do_center_crop", False):
        views = [_middle(view) for view in views]
    else:
        views = [shorten(view) for view in views]
    pixel_values = processor(list(views), return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.asarray(pixel_values, dtype=np.float32))


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
