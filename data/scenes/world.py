"""What a scene can show, and how scenes and their one-edit twins are drawn from a random generator."""

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES: Final = ("circle", "square", "triangle")
SIZES: Final = ("small", "large")
# One word each: finding an object by two words that others share, too, is much harder to learn.
PLACES: Final = ("northwest", "northeast", "southwest", "southeast")

# One pair per shape and three different colours, so every colour and every shape still occurs in training.
HELD_OUT: Final = tuple((COLOURS[2 * i + 1], shape) for i, shape in enumerate(SHAPES))
EDITS: Final = ("colour", "shape", "size", "move", "add", "remove")

# How often an object repeats the colour or shape of an earlier one: without it, counts above one are rare.
_ECHO: Final = 0.3
_RESERVED_SHARE: Final = 16

T = TypeVar("T")


class Thing(NamedTuple):
    """One object of a scene."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


Scene = tuple[Thing, ...]
"""The objects of one picture in the order of PLACES; at most one per place."""


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each equally likely (much cheaper than `Generator.choice`)."""
    return options[int(rng.random() * len(options))]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def scene_key(scene: Scene) -> int:
    """A number that is equal for equal descriptions: size, colour, shape and place of every object."""
    key = 0
    kinds = len(SIZES) * len(COLOURS) * len(SHAPES) + 1
    at = {thing.place: thing for thing in scene}
    for place in PLACES:
        thing = at.get(place)
        code = 0
        if thing is not None:
            code = SIZES.index(thing.size) * len(COLOURS) + COLOURS.index(thing.colour)
            code = code * len(SHAPES) + SHAPES.index(thing.shape) + 1
        key = key * kinds + code
    return key


def is_reserved(scene: Scene) -> bool:
    """Whether this description belongs to the held-out questions; training never shows it, with any seed.

    A fixed hash decides, not a look at what was drawn: scene i stays the same however many are asked for,
    and held-out scenes have the training distribution, scenes of a single object included.
    """
    x = (scene_key(scene) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF  # splitmix64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) % _RESERVED_SHARE == 0


def _sorted(things: Sequence[Thing]) -> Scene:
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def _draw_thing(rng: np.random.Generator, place: str, earlier: Sequence[Thing]) -> Thing:
    echo_colour, echo_shape = rng.random() < _ECHO, rng.random() < _ECHO
    colour = pick(rng, earlier).colour if earlier and echo_colour else pick(rng, COLOURS)
    shape = pick(rng, earlier).shape if earlier and echo_shape else pick(rng, SHAPES)
    # Only the shape is drawn again: the colours stay equally frequent.
    while (colour, shape) in HELD_OUT:
        shape = pick(rng, SHAPES)
    return Thing(pick(rng, SIZES), colour, shape, place)


def draw_scene(
    rng: np.random.Generator,
    *,
    reserved: bool = False,
    held_out: tuple[str, str] | None = None,
) -> Scene:
    """A scene of 1 to 4 objects; with `held_out`, one of them is that colour and shape.

    `reserved` says on which side of the split between training and held-out descriptions it must lie;
    a scene with a held-out pair lies on neither.
    """
    while True:
        count = 1 + int(rng.random() * len(PLACES))
        places = shuffled(rng, PLACES)[:count]
        things: list[Thing] = []
        if held_out is not None:
            things.append(Thing(pick(rng, SIZES), *held_out, places[0]))
        for place in places[len(things) :]:
            things.append(_draw_thing(rng, place, things))
        scene = _sorted(things)
        if held_out is not None or is_reserved(scene) == reserved:
            return scene


def _edited(rng: np.random.Generator, scene: Scene, edit: str) -> Scene | None:
    thing = pick(rng, scene)
    others = [other for other in scene if other is not thing]
    free = [place for place in PLACES if all(place != other.place for other in scene)]
    if edit == "colour":
        others.append(thing._replace(colour=pick(rng, [c for c in COLOURS if c != thing.colour])))
    elif edit == "shape":
        others.append(thing._replace(shape=pick(rng, [s for s in SHAPES if s != thing.shape])))
    elif edit == "size":
        others.append(thing._replace(size=pick(rng, [s for s in SIZES if s != thing.size])))
    elif edit == "move" and free:
        others.append(thing._replace(place=pick(rng, free)))
    elif edit == "add" and free:
        others.extend([thing, _draw_thing(rng, pick(rng, free), scene)])
    elif edit != "remove" or not others:
        return None
    return _sorted(others)


def draw_twin(rng: np.random.Generator, scene: Scene) -> Scene:
    """A training scene that differs from `scene` by exactly one edit of EDITS."""
    while True:
        twin = _edited(rng, scene, pick(rng, EDITS))
        if twin is None or is_reserved(twin) or any(thing.pair in HELD_OUT for thing in twin):
            continue
        return twin
