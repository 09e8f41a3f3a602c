"""Rows as long as those of a published instruction mixture, where the mixture itself isn't at hand."""

import numpy as np

IMAGE_TOKENS = 576


def lengths_like_mix665k(count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Tokens and images of rows: 40 % are text alone, of many turns and with a long tail; the rest have an image, with
    short turns (as VQA has) or a few long ones (as LLaVA-Instruct has)."""
    pictured = rng.random(count) >= 0.4
    text = np.exp(rng.normal(6.2, 1.0, count))
    answers = np.where(
        rng.random(count) < 0.35, np.exp(rng.normal(5.3, 0.5, count)), np.exp(rng.normal(4.3, 0.7, count))
    )
    lengths = np.where(pictured, IMAGE_TOKENS + answers, text).clip(12, 2048).astype(int)
    return lengths.tolist(), pictured.astype(int).tolist()
