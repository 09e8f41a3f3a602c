"""Captions of scenes in short, regular English with a small vocabulary."""

from collections.abc import Callable
from typing import Final

import numpy as np

from data.scenes.world import PLACES, Scene, Thing, pick, shuffled

DESCRIBE: Final = "describe the picture."
REPEAT: Final = "repeat."


def _noun(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def _noun_first(things: list[Thing]) -> str:
    return ", ".join(f"{_noun(thing)} {thing.place}" for thing in things)


def _place_first(things: list[Thing]) -> str:
    return ", ".join(f"{thing.place} {_noun(thing)}" for thing in things)


PHRASINGS: Final[tuple[Callable[[list[Thing]], str], ...]] = (_noun_first, _place_first)


def captions(rng: np.random.Generator, scene: Scene, count: int) -> list[str]:
    """`count` captions, each of another phrasing where there are enough, with the objects in its own order."""
    phrasings = shuffled(rng, PHRASINGS)
    return [phrasings[number % len(phrasings)](shuffled(rng, scene)) for number in range(count)]


def description(scene: Scene) -> str:
    """The one answer to DESCRIBE: objects in reading order, so that a model can know every word of it, and each after
    its place, which tells where to look."""
    return _place_first(sorted(scene, key=lambda thing: PLACES.index(thing.place)))


def look_up(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """The plainest question there is, and its answer: what is at a place."""
    place = pick(rng, PLACES)
    there = [_noun(thing) for thing in scene if thing.place == place]
    return f"what is in the {place}?", there[0] if there else "nothing"
