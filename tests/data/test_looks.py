"""The hash that finds look-alikes: copies have nearly the same, different pictures don't."""

import io
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.looks import ALIKE, alike, look
from vlm.images import read_image


def scene(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)


def compressed(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


def copies(image: Image.Image) -> list[Image.Image]:
    return [
        compressed(image, 30),
        image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR),
        compressed(image.resize((336, 336)), 80),
    ]


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_copies_look_alike_and_others_dont() -> None:
    scenes = [scene(seed) for seed in range(40)]
    hashes = [look(image) for image in scenes]
    assert all(
        bits(one, look(copy)) <= ALIKE for one, image in zip(hashes, scenes, strict=True) for copy in copies(image)
    )
    assert min(bits(one, other) for one, other in combinations(hashes, 2)) > ALIKE


def test_pairs_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    known = rng.integers(0, 1 << 63, 50, dtype=np.uint64)
    those = np.array([known[3], known[7] ^ np.uint64(0b1011), known[9] ^ np.uint64(0xFF)], dtype=np.uint64)
    assert alike(those, known) == [(0, 3, 0), (1, 7, 3)]
    assert alike(those, known[:0]) == alike(those[:0], known) == []


def test_any_picture_has_a_hash() -> None:
    for image in (Image.new("RGB", (1, 1)), Image.new("RGB", (1, 5000), "white"), Image.new("RGB", (64, 64), "red")):
        assert 0 <= look(image) < 1 << 64


@pytest.mark.slow
def test_photographs() -> None:
    root = os.environ.get("VLM_DEV_DATA")
    folder = Path(root or "none") / "flickr8k" / "images"
    if not folder.is_dir():
        pytest.skip("VLM_DEV_DATA names no folder with flickr8k")
    photographs = [read_image(path) for path in sorted(folder.iterdir())]
    hashes = np.array([look(image) for image in photographs], dtype=np.uint64)
    assert {(a, b) for a, b, _ in alike(hashes, hashes) if a != b} == set()
    for number, image in enumerate(photographs[:300]):
        for copy in copies(image):
            assert [pair[1] for pair in alike(np.array([look(copy)], dtype=np.uint64), hashes)] == [number]
