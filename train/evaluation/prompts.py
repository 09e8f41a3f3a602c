"""What a model is asked: a benchmark's questions in its fixed words, demonstrations before them, controls."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.benchmarks import Benchmark, Item
from data.pictures import ImageRef, MissingImage
from vlm.errors import UserError

CONTROLS = ("none", "blind", "shuffled")
DRAWS = 64  # of a place to swap with, before all are looked at


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's text with an image before it or none; `answer`: what a demonstration answers, "" for the question."""

    text: str
    image: ImageRef | None = None
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, demonstrations first; choices: the answers that may be ranked by their likelihood."""

    id: str
    turns: tuple[Turn, ...]
    choices: tuple[str, ...] = ()

    @property
    def images(self) -> list[ImageRef]:
        return [turn.image for turn in self.turns if turn.image is not None]

    @property
    def size(self) -> int:
        """About how long it is, known without a tokenizer: batches are made of prompts of like length."""
        return sum(len(turn.text) + len(turn.answer) for turn in self.turns)

    def messages(self) -> list[dict[str, Any]]:
        """As the chat template takes them; images are parts without a name."""
        found = []
        for turn in self.turns:
            parts: list[dict[str, Any]] = [{"type": "image"}] if turn.image is not None else []
            found.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.text}]})
            if turn.answer:
                found.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return found


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a prompt: its answer, or why it has none.

    seconds: its part of the time that asking took; pictures: a digest of those that it was asked about.
    """

    id: str
    answer: str | None = None
    error: str | None = None
    seconds: float = 0.0
    pictures: str = ""

    @classmethod
    def failed(cls, prompt: Prompt, why: object) -> "Reply":
        return cls(prompt.id, None, str(why).encode(errors="replace").decode())

    def as_json(self) -> Mapping[str, str | float | None]:
        said = {"answer": self.answer} if self.error is None else {"error": self.error}
        return {"id": self.id, **said, "seconds": self.seconds, "pictures": self.pictures}


@dataclass(frozen=True)
class Shots:
    """Demonstrations for few-shot prompts: `count` of `pool` before each question, drawn by `seed`."""

    count: int
    pool: Sequence[Item]
    seed: int

    def draw(self, index: int, item: Item) -> list[Item]:
        """Of other images than the question's (or, without one, other questions); the same ones whatever else is asked.

        UserError when there aren't so many.
        """
        rng = np.random.default_rng((self.seed, index))
        drawn: dict[int, Item] = {}
        for place in self._places(rng):
            one = self.pool[place]
            same = one.question == item.question if item.image is None else one.image == item.image
            if not same:
                drawn[place] = one
            if len(drawn) == self.count:
                return list(drawn.values())
        raise UserError(
            f"--shots {self.count}: question {item.id} has only {len(drawn)} demonstrations with another image, among "
            f"{len(self.pool)} with answers"
        )

    def _places(self, rng: np.random.Generator) -> Iterator[int]:
        """All places in a random order; of a large pool the first few cost no permutation of it."""
        size = 4 * self.count + 16 if self.pool else 0
        seen = dict.fromkeys(rng.integers(max(len(self.pool), 1), size=size).tolist())  # in the order of the draws
        yield from seen
        yield from (place for place in rng.permutation(len(self.pool)).tolist() if place not in seen)


def make_prompts(
    benchmark: Benchmark,
    items: Sequence[Item],
    template: str,
    control: str = "none",
    seed: int = 0,
    shots: Shots | None = None,
) -> list[Prompt]:
    """blind withholds all images, shuffled shows each question another question's."""
    images = controlled_images(items, control, seed)
    prompts = []
    for index, (item, image) in enumerate(zip(items, images, strict=True)):
        turns = [
            Turn(ask(template, one), None if control == "blind" else one.image, benchmark.demonstrated(one))
            for one in (shots.draw(index, item) if shots else [])
        ]
        prompts.append(Prompt(item.id, (*turns, Turn(ask(template, item), image)), benchmark.choices(item)))
    return prompts


def ask(template: str, item: Item) -> str:
    # not str.format: a question may have braces, and so may a template of one's own
    return template.replace("{question}", item.question)


def controlled_images(items: Sequence[Item], control: str, seed: int) -> list[ImageRef | None]:
    """The image that each item is asked about. shuffled: a permutation that leaves no item its own picture.

    Missing pictures stay where they are, so that the same questions fail whatever the control.
    """
    images = [item.image for item in items]
    if control == "none":
        return images
    if control == "blind":
        return [image if isinstance(image, MissingImage) else None for image in images]
    there = [place for place, image in enumerate(images) if not isinstance(image, MissingImage)]
    numbers: dict[ImageRef | None, int] = {}
    own = np.array([numbers.setdefault(images[place], len(numbers)) for place in there])
    if len(numbers) < 2:
        raise UserError("--control shuffled needs at least two different images")
    pictures = list(numbers)
    shown = images.copy()
    for place, number in zip(there, _shuffled(own, np.random.default_rng(seed)).tolist(), strict=True):
        shown[place] = pictures[number]
    return shown


def _shuffled(own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation of `own` that is another number everywhere."""
    found = rng.permutation(own)
    for i in np.flatnonzero(found == own):
        mine = own[i]
        if found[i] != mine:  # swapped away since
            continue
        drawn = rng.integers(len(own), size=DRAWS)
        others = drawn[(own[drawn] != mine) & (found[drawn] != mine)]
        if not len(others):
            others = rng.permutation(np.flatnonzero((own != mine) & (found != mine)))
        if not len(others):
            raise UserError("--control shuffled: one image belongs to more than half of the items")
        found[i], found[others[0]] = found[others[0]], mine
    return found
