"""Random changes of pictures: within their bounds, drawn from the given generator, off by default."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.augment import Augment

SIDE = 256


def pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(image).astype(np.int64)


def noise(width: int = 9, height: int = 7) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_by_default_nothing_changes_and_nothing_is_drawn() -> None:
    image, rng = noise(), np.random.default_rng(0)
    assert Augment()(image, rng) is image
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    "augment",
    [Augment(crop=0.5), Augment(shift=2), Augment(flip=True), Augment(jitter=0.3), Augment(0.5, 2, True, 0.3)],
)
def test_the_generator_alone_decides(augment: Augment) -> None:
    image = noise()
    before = image.tobytes()
    outcomes = []
    for seed in range(12):
        once, again = (augment(image, np.random.default_rng(seed)) for _ in range(2))
        assert once.tobytes() == again.tobytes()
        assert (once.size, once.mode) == (image.size, "RGB")
        outcomes.append(once.tobytes())
    assert len(set(outcomes)) >= 2
    assert image.tobytes() == before


@pytest.mark.parametrize("seed", range(5))
def test_a_crop_is_drawn_no_larger_than_needed_and_shows_the_same(seed: int) -> None:
    columns, rows = np.meshgrid(np.arange(SIDE * 2), np.arange(SIDE))
    image = Image.fromarray(np.stack([columns // 2, rows, rows], axis=2).astype(np.uint8))
    whole = Augment(crop=0.5)(image, np.random.default_rng(seed))
    small = Augment(crop=0.5)(image, np.random.default_rng(seed), edge=32)
    assert (whole.size, small.size) == ((512, 256), (64, 32))
    assert np.abs(pixels(whole.resize((64, 32), Image.Resampling.BOX)) - pixels(small))[4:-4, 4:-4].max() <= 3
    assert Augment(crop=0.5)(image, np.random.default_rng(seed), edge=999).size == image.size


@pytest.mark.parametrize("crop", [0.3, 0.6, 0.9])
def test_a_crop_keeps_its_share_of_the_area_and_its_shape(crop: float) -> None:
    # red tells the column and green the row, so the corners tell what was cut out
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=2).astype(np.uint8))
    shares, ratios, lefts = [], [], []
    for seed in range(200):
        out = pixels(Augment(crop=crop)(image, np.random.default_rng(seed)))
        # a window of w columns, stretched to SIDE, climbs by w / SIDE a pixel; the rims are clamped, the inside is not
        width, height = (
            (out[128, 192, 0] - out[128, 64, 0]) * SIDE / 128,
            (out[192, 128, 1] - out[64, 128, 1]) * SIDE / 128,
        )
        shares.append(width * height / SIDE**2)
        ratios.append(width / height)
        lefts.append(out[128, 0, 0])
    slack = 0.02
    assert min(shares) > crop - slack
    assert max(shares) < 1 + slack
    assert min(ratios) > 3 / 4 - slack
    assert max(ratios) < 4 / 3 + 2 * slack
    assert min(shares) < crop + 0.1 * (1 - crop) + slack  # the whole range is used
    assert len(set(lefts)) > 5


def test_a_shift_moves_the_picture_and_repeats_its_edges() -> None:
    image = noise()
    padded = np.pad(pixels(image), ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = {
        (right, down): padded[2 - down : 2 - down + 7, 2 - right : 2 - right + 9]
        for right in range(-2, 3)
        for down in range(-2, 3)
    }
    found: Counter[tuple[int, int]] = Counter()
    for seed in range(300):
        out = pixels(Augment(shift=2)(image, np.random.default_rng(seed)))
        matching = [move for move, window in windows.items() if np.array_equal(window, out)]
        assert len(matching) == 1
        found[matching[0]] += 1
    assert set(found) == set(windows)


def test_half_of_the_pictures_are_mirrored() -> None:
    image = noise()
    mirrored = 0
    for seed in range(400):
        out = pixels(Augment(flip=True)(image, np.random.default_rng(seed)))
        flipped = np.array_equal(out, pixels(image)[:, ::-1])
        assert flipped != np.array_equal(out, pixels(image))
        mirrored += flipped
    assert 150 < mirrored < 250


def test_jitter_changes_brightness_contrast_and_saturation_within_its_bounds() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))  # has no contrast and no colour: only brightness shows
    levels = [pixels(Augment(jitter=0.3)(grey, np.random.default_rng(seed)))[0, 0, 0] for seed in range(200)]
    assert 69 <= min(levels) < 75
    assert 125 < max(levels) <= 131
    half = Image.fromarray(np.repeat(np.array([[[60, 60, 60]], [[140, 140, 140]]], np.uint8), 8, axis=1))
    luma = np.array([0.299, 0.587, 0.114])
    contrasts, saturations = [], []
    for seed in range(200):
        dark, bright = pixels(Augment(jitter=0.3)(half, np.random.default_rng(seed)))[:, 0, 0]
        contrasts.append((bright - dark) / ((bright + dark) / 2) / (80 / 100))  # free of brightness
        flat = Image.new("RGB", (8, 8), (60, 100, 140))
        out = pixels(Augment(jitter=0.3)(flat, np.random.default_rng(seed)))[0, 0]
        saturations.append((out[2] - out[0]) / (out @ luma) / (80 / (np.array([60, 100, 140]) @ luma)))
    assert 0.66 < min(contrasts) < 0.75
    assert 1.25 < max(contrasts) < 1.34
    # a change of contrast spreads the channels, too: what shows is 0.7 to 1.3 twice over
    assert 0.47 < min(saturations) < 0.6
    assert 1.5 < max(saturations) < 1.72


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"crop": 0}, "share of the area"),
        ({"crop": 1.1}, "share of the area"),
        ({"shift": -1}, "negative"),
        ({"jitter": -0.1}, "negative"),
    ],
)
def test_senseless_settings_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Augment(**options)


def test_tiny_and_flat_pictures_survive() -> None:
    augment = Augment(crop=0.1, shift=3, flip=True, jitter=0.5)
    for size in ((1, 1), (200, 1), (1, 200)):
        for seed in range(5):
            assert augment(Image.new("RGB", size), np.random.default_rng(seed)).size == size
