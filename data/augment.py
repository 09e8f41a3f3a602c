"""Random changes of training pictures, each drawn from the generator of its example."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance


@dataclass(frozen=True)
class Augment:
    """crop: smallest share of the area that a random crop keeps (1 = off); shift: largest move in pixels, edges
    repeated; flip: mirror every other picture; jitter: largest relative change of brightness, contrast, saturation."""

    crop: float = 1.0
    shift: int = 0
    flip: bool = False
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is a share of the area, above 0 and up to 1, got {self.crop}")
        if self.shift < 0 or not 0 <= self.jitter < float("inf"):
            raise ValueError(f"shift and jitter can't be negative or infinite, got {self.shift} and {self.jitter}")

    def __call__(self, image: Image.Image, rng: np.random.Generator, edge: int | None = None) -> Image.Image:
        """edge: pixels that the shorter edge needs; a crop is drawn no larger, which spares work on large pictures."""
        if self.crop < 1:
            image = _random_crop(image, self.crop, rng, edge or min(image.size))
        if self.shift:
            image = _random_shift(image, self.shift, rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(1 + self.jitter * float(rng.uniform(-1, 1)))
        return image


def _random_crop(image: Image.Image, smallest: float, rng: np.random.Generator, edge: int) -> Image.Image:
    """Inception-style: a share of the area, an aspect ratio between 3:4 and 4:3 of the picture's own, as far as a crop
    of that share fits in."""
    share = rng.uniform(smallest, 1.0)
    widest = np.log(min(4 / 3, 1 / share))
    ratio = np.exp(rng.uniform(-widest, widest))
    width = min(image.width, max(1, round(image.width * float(np.sqrt(share * ratio)))))
    height = min(image.height, max(1, round(image.height * float(np.sqrt(share / ratio)))))
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    scale = min(1.0, edge / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _random_shift(image: Image.Image, most: int, rng: np.random.Generator) -> Image.Image:
    right, down = (int(n) for n in rng.integers(-most, most + 1, 2))
    pixels = np.pad(np.asarray(image), ((most, most), (most, most), (0, 0)), mode="edge")
    top, left = most - down, most - right
    return Image.fromarray(pixels[top : top + image.height, left : left + image.width])
