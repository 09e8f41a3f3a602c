"""Whether a model that was written is the one that was read: the logits of both on the same images and texts."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.errors import UserError
from vlm.processing import VisionLanguageProcessor

TEXT_TOKENS = 12
# What an adapter changes is measured where it is more than so many roundings of the largest logit. Rounding hides part
# of small changes (0.02 of a bfloat16 model's change of 11 roundings, 0.54 of one of 2); a forgotten adapter lacks all.
ROUNDINGS = 2
TOLERATED = 0.75


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


def compare(
    expected: Sequence[torch.Tensor],
    got: Sequence[torch.Tensor],
    dtype: torch.dtype,
    base: Sequence[torch.Tensor] | None = None,
) -> Difference:
    """UserError when the difference is more than rounding makes, or when an adapter isn't in what was written.

    base: what the model says without its adapter, where it has one.
    """
    largest = _largest(one - other for one, other in zip(expected, got, strict=True))
    scale = max(1.0, _largest(expected))
    eps = float(torch.finfo(dtype).eps)
    bound = scale * eps**0.5
    if not largest <= bound:  # a NaN is no agreement
        raise UserError(
            f"what was written doesn't answer as its source does: logits differ by {largest:.3g}, and rounding makes "
            f"up to {bound:.3g}; nothing was kept"
        )
    changed = 0.0 if base is None else _largest(one - other for one, other in zip(expected, base, strict=True))
    if base is not None and not changed <= ROUNDINGS * scale * eps:
        share = _share(expected, got, base)
        if not abs(share - 1) <= TOLERATED:
            raise UserError(
                f"what was written answers with {share:.0%} of what the adapter changes in its base's answers, and "
                f"{1 - TOLERATED:.0%} to {1 + TOLERATED:.0%} is rounding; nothing was kept"
            )
    return Difference(largest, bound)


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    """Of all numbers; NaN if any is one, which Python's own max would drop."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())


def _share(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor], base: Sequence[torch.Tensor]) -> float:
    """How much of expected - base there is in got - base: 1 for the same, 0 for the base itself.

    The length of a projection: what rounding does points anywhere in a space of very many dimensions, and so hardly
    changes it, even where rounding is as large as what the adapter changes, and a bound on differences sees nothing.
    """
    along, length = 0.0, 0.0
    for one, other, plain in zip(expected, got, base, strict=True):
        change = (one - plain).flatten()
        along += float(change @ (other - plain).flatten())
        length += float(change @ change)
    return along / length


def release() -> None:
    """Gives back what a dropped model held: modules refer to each other in circles."""
    gc.collect()


def _blocks(seed: int, width: int, height: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
