"""Whether a model that was written is the one that was read: the logits of both on the same images and texts."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.errors import UserError
from vlm.processing import VisionLanguageProcessor

TEXT_TOKENS = 12


@dataclass(frozen=True)
class Difference:
    """largest: of any two logits; bound: what rounding may do in this number format to logits of this size."""

    largest: float
    bound: float


@dataclass(frozen=True)
class Probe:
    """A text, and a text with images, as a model gets them; the same for every call."""

    text: torch.Tensor  # [1, T]
    with_images: torch.Tensor  # [1, T]
    images: tuple[Image.Image, ...]
    pixels: dict[str, torch.Tensor]


def make_probe(processor: VisionLanguageProcessor, vocab_size: int, context: int | None) -> Probe:
    """Random tokens and two pictures of blocks, one wide and one high (one, where two don't fit into the context)."""
    edge = processor.image_tokens.view_size
    images: Sequence[Image.Image] = [_blocks(0, 2 * edge, edge), _blocks(1, edge, edge + edge // 2)]
    if context is not None and sum(processor.placeholders(images)) + 3 * TEXT_TOKENS > context:
        images = images[:1]
    generator = torch.Generator().manual_seed(0)

    def words() -> list[int]:
        known = min(vocab_size, len(processor.tokenizer)) - 1
        drawn = torch.randint(0, known, (TEXT_TOKENS,), generator=generator)
        return (drawn + (drawn >= processor.image_token_id)).tolist()  # any token but the image token

    ids = words()
    for count in processor.placeholders(images):
        ids += [processor.image_token_id] * count + words()
    return Probe(torch.tensor([words()]), torch.tensor([ids]), tuple(images), processor.pixels(images))


@torch.no_grad()
def logits(model: Any, probe: Probe, pixels: dict[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """What the model makes of the probe, in float32. pixels: the images in the form that the model takes them in."""
    model.eval()
    text = model(input_ids=probe.text).logits
    both = model(input_ids=probe.with_images, **(pixels or probe.pixels)).logits
    return [text.float(), both.float()]


def compare(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor], dtype: torch.dtype) -> Difference:
    """UserError when the difference is more than rounding makes."""
    largest = max(float((one - other).abs().max()) for one, other in zip(expected, got, strict=True))
    scale = max(1.0, *(float(one.abs().max()) for one in expected))
    bound = scale * float(torch.finfo(dtype).eps) ** 0.5
    if not largest <= bound:  # a NaN is no agreement
        raise UserError(
            f"what was written doesn't answer as its source does: logits differ by {largest:.3g}, and rounding makes "
            f"up to {bound:.3g}; nothing was kept"
        )
    return Difference(largest, bound)


def release() -> None:
    """Gives back what a dropped model held: modules refer to each other in circles."""
    gc.collect()


def _blocks(seed: int, width: int, height: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
