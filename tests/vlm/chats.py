"""Random pictures and prompts of several lengths and numbers of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

PAIRS = [(fusion, connector) for fusion in ("early", "deep") for connector in ("mlp", "perceiver")]


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Noise in blocks, so that pictures still differ after scaling."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def user(*parts: str | None) -> list[dict[str, Any]]:
    """One user message; None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def pad_left(processor: Any, prompts: Sequence[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, T] of prompts that an assistant is to answer; images are of `picture`'s size."""
    each = processor.image_tokens.placeholders(32, 40)
    counts = [sum(part["type"] == "image" for turn in prompt for part in turn["content"]) for prompt in prompts]
    rows = [
        processor.chat.encode(prompt, [each] * count, add_generation_prompt=True).input_ids
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    length = max(len(row) for row in rows)
    pad = processor.tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
