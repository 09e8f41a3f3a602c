"""The rows of every file, each made from its own random stream so that no row depends on another."""

from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from data.scenes.draw import Look, draw_look, render
from data.scenes.language import DESCRIBE, REPEAT, captions, description, look_up
from data.scenes.questions import (
    ANSWERS,
    KINDS,
    Keep,
    Question,
    ask,
    ask_many,
    asks_where,
    counts_colours,
    names_a_place,
)
from data.scenes.world import HELD_OUT, PLACES, Scene, Thing, draw_scene, draw_twin, shuffled

Row = dict[str, Any]

TEXT_QUESTIONS: Final = 4
LOOK_UPS: Final = 2
# Shares of text rows that begin by saying the caption again, and by putting it in reading order. Copying is what a
# small model learns first, and what it then builds looking things up on: without it, answers stay guesses longer.
_REPEATED: Final = 0.25
_DESCRIBED: Final = 0.5
_CROWD_COLOURS: Final = 3
# Kinds whose answers are equally frequent in training. Held-out ones are exactly so, else a guess gains by luck of the
# draw: "no" was right in 57 % of one seed's comparisons.
_EVEN: Final = ("colour", "shape", "existence", "comparison")


class Stream(IntEnum):
    """Sources of randomness; the numbers are part of the format."""

    TRAIN = 0
    TRAIN_WORDS = 1
    TEXT = 2
    HELDOUT = 3
    UNSEEN = 4
    LESSONS = 5


class Drawn(NamedTuple):
    """A scene with the look of its picture."""

    scene: Scene
    look: Look


def _rng(seed: int, stream: Stream, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, index])


def train_pair(seed: int, pair: int) -> tuple[Drawn, Drawn]:
    """Training scenes 2 * pair and 2 * pair + 1: twins with one look."""
    rng = _rng(seed, Stream.TRAIN, pair)
    scene = draw_scene(rng)
    twin = draw_twin(rng, scene)
    look = draw_look(rng)
    return Drawn(scene, look), Drawn(twin, look)


def train_rows(seed: int, index: int, scene: Scene, image: str, questions: int) -> tuple[Row, Row, Row]:
    """The rows of one training picture in captions.jsonl, captions_chat.jsonl and chat.jsonl."""
    rng = _rng(seed, Stream.TRAIN_WORDS, index)
    first, second = captions(rng, scene, 2)
    asked = ask_many(rng, scene, questions)
    picture = {"type": "image", "image": image}
    described = [
        {"role": "user", "content": [picture, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": description(scene)},
    ]
    return {"image": image, "captions": [first, second]}, {"messages": described}, _conversation(asked, image)


def _conversation(questions: Sequence[Question], image: str) -> Row:
    turns: list[Row] = []
    for question in questions:
        turns.append({"role": "user", "content": question.text})
        turns.append({"role": "assistant", "content": question.answer})
    turns[0]["content"] = [{"type": "image", "image": image}, {"type": "text", "text": turns[0]["content"]}]
    return {"messages": turns}


def _any_scene(_scene: Scene) -> bool:
    return True


def _is_crowded(scene: Scene) -> bool:
    """Four objects of three colours at least."""
    return len(scene) == len(PLACES) and len({thing.colour for thing in scene}) >= _CROWD_COLOURS


def _is_varied(scene: Scene) -> bool:
    """Crowded, and no two objects of the same colour and shape: each can be named."""
    return _is_crowded(scene) and len({thing.pair for thing in scene}) == len(PLACES)


class Lesson(NamedTuple):
    """What lessons.jsonl teaches, from a share of its pictures on."""

    begins: float
    kinds: Sequence[str]
    keep: Keep
    suits: Callable[[Scene], bool] = _any_scene


def _looks_up(text: str) -> bool:
    """What is at a place, or the place of an object."""
    return names_a_place(text) or asks_where(text)


# One way of asking at a time, in scenes where guessing fails: what a lesson leaves a guess stays one for a thousand
# steps of all questions. What colour is at a place comes first, as the plainest question there is; then the way back,
# from an object to its place, which relations and existence build on, with one in four of the first, which is forgotten
# else; then counting colours, which compares a whole scene with the question. Shapes at a place come last: before the
# others they keep runs from learning these. A question is alone in its row: what is looked for is always as far away.
_LESSONS: Final = (
    Lesson(0.0, ("colour",), names_a_place, _is_crowded),
    Lesson(0.222, ("relation", "relation", "relation", "colour"), _looks_up, _is_varied),
    Lesson(0.544, ("count",), counts_colours),
    Lesson(0.811, ("colour", "shape", "relation"), _looks_up, _is_varied),
)


def lesson_rows(seed: int, index: int, count: int, questions: int, image: str) -> tuple[Drawn, list[Row]]:
    """Picture `index` of `count` and its rows in lessons.jsonl: one question each."""
    rng = _rng(seed, Stream.LESSONS, index)
    lesson = next(lesson for lesson in reversed(_LESSONS) if index >= lesson.begins * count)
    scene = draw_scene(rng)
    while not lesson.suits(scene):
        scene = draw_scene(rng)
    look = draw_look(rng)
    asked = ask_many(rng, scene, questions, lesson.kinds, lesson.keep)
    return Drawn(scene, look), [_conversation([question], image) for question in asked]


def text_row(seed: int, index: int) -> Row:
    """A row of text.jsonl: a caption, perhaps said again or put in order, and questions about it."""
    rng = _rng(seed, Stream.TEXT, index)
    scene = draw_scene(rng)
    (caption,) = captions(rng, scene, 1)
    exchanges = [look_up(rng, scene) for _ in range(LOOK_UPS)]
    exchanges += [(question.text, question.answer) for question in ask_many(rng, scene, TEXT_QUESTIONS)]
    exchanges = shuffled(rng, exchanges)
    kind = rng.random()
    if kind < _REPEATED:
        exchanges.insert(0, (REPEAT, caption))
    elif kind < _REPEATED + _DESCRIBED:
        exchanges.insert(0, (DESCRIBE, description(scene)))
    turns: list[Row] = []
    for asked, answer in exchanges:
        turns.append({"role": "user", "content": asked if turns else f"{caption}. {asked}"})
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns}


def heldout_item(seed: int, index: int) -> tuple[Drawn, Question]:
    """Held-out scene and question, drawn as the training ones are; kinds take turns, and the answers of _EVEN ones."""
    rng = _rng(seed, Stream.HELDOUT, index)
    turn, which = divmod(index, len(KINDS))
    kind = KINDS[which]
    answer = ANSWERS[kind][turn % len(ANSWERS[kind])] if kind in _EVEN else None
    while True:
        scene = draw_scene(rng, reserved=True)
        question = ask(rng, scene, kind, answer=answer)
        if question is not None:
            return Drawn(scene, draw_look(rng)), question


def unseen_item(seed: int, index: int) -> tuple[Drawn, Question]:
    """A scene with one object of a held-out pair, and a question that concerns this object.

    Kinds take turns, then the held-out pairs, then the answers (of colour and shape the object has but one).
    """
    rng = _rng(seed, Stream.UNSEEN, index)
    turn, which = divmod(index, len(KINDS))
    kind = KINDS[which]
    turn, which = divmod(turn, len(HELD_OUT))
    pair = HELD_OUT[which]
    # No scene that shows the object has none of its shape, so a count of 0 can't be asked for.
    answers = ANSWERS[kind][1:] if kind == "count" else ANSWERS[kind]
    answer = None if kind in ("colour", "shape") else answers[turn % len(answers)]
    while True:
        scene = draw_scene(rng, held_out=pair)
        focus: Thing = next(thing for thing in scene if thing.pair == pair)
        question = ask(rng, scene, kind, answer=answer, focus=focus)
        if question is not None:
            return Drawn(scene, draw_look(rng)), question


def save_picture(drawn: Drawn, path: Path) -> None:
    """Writes the picture as PNG; compressed a little only, which is several times faster."""
    Image.fromarray(render(*drawn)).save(path, "PNG", compress_level=1)
