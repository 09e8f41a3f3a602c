"""Captions of scenes in short, regular English with a small vocabulary."""

from collections.abc import Callable
from typing import Final

import numpy as np

from data.scenes.world import Scene, Thing, shuffled

DESCRIBE: Final = "describe the picture."


def _join(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _noun(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _plain(things: list[Thing]) -> str:
    return _join([f"{_noun(thing)} at the {thing.place}" for thing in things])


def _there_is(things: list[Thing]) -> str:
    return f"there is {_plain(things)}"


def _place_first(things: list[Thing]) -> str:
    return _join([f"at the {thing.place} {_noun(thing)}" for thing in things])


PHRASINGS: Final[tuple[Callable[[list[Thing]], str], ...]] = (_plain, _there_is, _place_first)


def captions(rng: np.random.Generator, scene: Scene, count: int) -> list[str]:
    """`count` captions (at most 3), each of another phrasing and with the objects in its own order."""
    if count > len(PHRASINGS):
        raise ValueError(f"there are {len(PHRASINGS)} ways to put a caption, {count} were asked for")
    return [phrase(shuffled(rng, scene)) for phrase in shuffled(rng, PHRASINGS)[:count]]
