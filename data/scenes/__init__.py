"""Synthetic pictures of coloured shapes with captions and questions, written to disk as PNG and JSONL."""

from data.scenes.world import COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, Thing
from data.scenes.write import FORMAT_VERSION, write_scenes

__all__ = [
    "COLOURS",
    "FORMAT_VERSION",
    "HELD_OUT",
    "PLACES",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "write_scenes",
]
