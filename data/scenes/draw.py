"""From a scene to pixels."""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from data.scenes.world import PLACES, Scene, pick

SIDE: Final = 64
RGB: Final = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (235, 210, 45),
    "purple": (150, 50, 185),
    "cyan": (40, 205, 215),
}
SHADE: Final = 10
BACKGROUNDS: Final = ("plain", "noise", "stripes", "checks", "gradient")

_HALF: Final = SIDE // 2
_RADIUS: Final = {"small": 8, "large": 12}
_JITTER: Final = 2
_GREY: Final = (120, 205)
_TINT: Final = 14
_CONTRAST: Final = (10, 18)

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class Look(NamedTuple):
    """All that varies in a picture beside its scene; twins share one, so only their edit tells them apart."""

    canvas: Pixels  # [SIDE, SIDE, 3]
    offset: list[list[int]]  # per place: x, y in pixels from the middle of the quadrant
    growth: list[int]  # per place: added to the radius, 0 or 1
    shade: npt.NDArray[np.int16]  # [places, 3], added to the object's colour


def _mask(shape: str, radius: int) -> Mask:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "circle":
        return np.asarray(x * x + y * y <= (radius + 0.3) ** 2)
    if shape == "triangle":
        return np.asarray(2 * np.abs(x) <= y + radius)
    return np.ones((2 * radius + 1, 2 * radius + 1), dtype=np.bool_)


_MASKS: Final = {
    (shape, radius + growth): _mask(shape, radius + growth)
    for shape in ("circle", "square", "triangle")
    for radius in _RADIUS.values()
    for growth in (0, 1)
}
_Y, _X = (grid.astype(np.int16) for grid in np.mgrid[0:SIDE, 0:SIDE])
_GRIDS: Final = (_X, _Y, _X + _Y, _X - _Y + SIDE)


def _background(rng: np.random.Generator) -> Pixels:
    low, high = _GREY
    base = low + int(rng.random() * (high - low)) + rng.integers(-_TINT, _TINT + 1, size=3, dtype=np.int16)
    depth = _CONTRAST[0] + int(rng.random() * (_CONTRAST[1] - _CONTRAST[0] + 1))
    kind = pick(rng, BACKGROUNDS)
    grid = pick(rng, _GRIDS)
    period = 3 + int(rng.random() * 6)
    if kind == "plain":
        light = np.zeros((SIDE, SIDE), dtype=np.int16)
    elif kind == "noise":
        light = rng.integers(-depth, depth + 1, size=(SIDE, SIDE), dtype=np.int16)
    elif kind == "stripes":
        light = ((grid // period) & 1) * depth
    elif kind == "checks":
        light = (((_X // period) + (_Y // period)) & 1) * depth
    else:
        light = grid * (2 * depth) // int(grid.max()) - depth
    return (base + light[:, :, None]).astype(np.uint8)


def draw_look(rng: np.random.Generator) -> Look:
    """Draws a background and, for every place, a shift, a size and a shade."""
    return Look(
        canvas=_background(rng),
        offset=rng.integers(-_JITTER, _JITTER + 1, size=(len(PLACES), 2)).tolist(),
        growth=rng.integers(0, 2, size=len(PLACES)).tolist(),
        shade=rng.integers(-SHADE, SHADE + 1, size=(len(PLACES), 3), dtype=np.int16),
    )


def render(scene: Scene, look: Look) -> Pixels:
    """The picture [SIDE, SIDE, 3]; every object stays inside its own quadrant."""
    canvas = look.canvas.copy()
    for thing in scene:
        place = PLACES.index(thing.place)
        radius = _RADIUS[thing.size] + look.growth[place]
        row, column = divmod(place, 2)
        left = column * _HALF + _HALF // 2 + look.offset[place][0] - radius
        top = row * _HALF + _HALF // 2 + look.offset[place][1] - radius
        span = 2 * radius + 1
        colour = (look.shade[place] + RGB[thing.colour]).astype(np.uint8)
        canvas[top : top + span, left : left + span][_MASKS[thing.shape, radius]] = colour
    return canvas
