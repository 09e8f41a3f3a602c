"""What a model is asked: a benchmark's questions in its fixed words, demonstrations before them, controls."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from data.benchmarks import Benchmark, Item
from data.benchmarks.base import Asked
from data.pictures import ImageRef, MissingImage
from vlm.errors import UserError

CONTROLS = ("none", "blind", "shuffled")
DRAWS = 64  # of a place to swap with, before all are looked at
TRIES = 20  # to exchange the images of questions with several


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's text with an image before it or none; `answer`: what a demonstration answers, "" for the question.

    asked: the whole of a question that is more than that; `text` and `image` are then its last text and first image.
    """

    text: str
    image: ImageRef | None = None
    answer: str = ""
    asked: Asked | None = None

    @property
    def images(self) -> tuple[ImageRef, ...]:
        if self.asked is not None:
            return self.asked.images
        return () if self.image is None else (self.image,)

    def messages(self) -> list[dict[str, Any]]:
        """Made anew: whoever gets them may change them."""
        if self.asked is not None:
            found = [
                {"role": message["role"], "content": [dict(part) for part in message["content"]]}
                for message in self.asked.messages
            ]
        else:
            parts: list[dict[str, Any]] = [{"type": "image"}] if self.image is not None else []
            found = [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]
        if self.answer:
            found.append({"role": "assistant", "content": [{"type": "text", "text": self.answer}]})
        return found


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, demonstrations first; choices: the answers that may be ranked by their likelihood."""

    id: str
    turns: tuple[Turn, ...]
    choices: tuple[str, ...] = ()

    @property
    def images(self) -> list[ImageRef]:
        return [image for turn in self.turns for image in turn.images]

    @property
    def size(self) -> int:
        """About how long it is, known without a tokenizer: batches are made of prompts of like length."""
        return sum(len(turn.text) + len(turn.answer) for turn in self.turns)

    def messages(self) -> list[dict[str, Any]]:
        """As the chat template takes them; images are parts without a name."""
        return [message for turn in self.turns for message in turn.messages()]


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
            same = bool({*one.images} & {*item.images}) if item.images else one.question == item.question
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
    pictures = controlled_pictures(items, control, seed)
    prompts = []
    for index, (item, shown) in enumerate(zip(items, pictures, strict=True)):
        turns = [
            turn(template, one, (None,) * len(one.images) if control == "blind" else one.images, benchmark)
            for one in (shots.draw(index, item) if shots else [])
        ]
        turns.append(turn(template, item, shown))
        if any(one.asked is not None and one.asked.messages[0]["role"] == "system" for one in turns[1:]):
            raise UserError("--shots: a question with a system text can't stand behind demonstrations")
        prompts.append(Prompt(item.id, tuple(turns), benchmark.choices(item)))
    return prompts


def turn(template: str, item: Item, shown: Sequence[ImageRef | None], benchmark: Benchmark | None = None) -> Turn:
    """An item as it's asked. shown: a picture for each of its own, None for none; benchmark: it is answered, too."""
    images = tuple(image for image in shown if image is not None)
    first = images[0] if images else None
    answer = benchmark.demonstrated(item) if benchmark is not None else ""
    if item.asked is None:
        return Turn(ask(template, item), first, answer)
    messages = phrased(item.asked.messages, template, item)
    rest = iter(shown)
    kept = [
        {
            **message,
            "content": [part for part in message["content"] if part["type"] == "text" or next(rest) is not None],
        }
        for message in messages
    ]
    if len(images) > len(item.images):  # of another question, where this one has none
        kept[-1]["content"] = [{"type": "image"}, *kept[-1]["content"]]
    return Turn(ask(template, item), first, answer, Asked(tuple(kept), images))


def phrased(messages: Sequence[dict[str, Any]], template: str, item: Item) -> list[dict[str, Any]]:
    """The messages, with the template's words around the last one's text."""
    *before, last = messages
    parts = [dict(part) for part in last["content"]]
    texts = [part for part in parts if part["type"] == "text"]
    if template.count("{question}") != 1 or not texts:
        parts = [*(part for part in parts if part["type"] != "text"), {"type": "text", "text": ask(template, item)}]
    else:
        head, _, tail = template.partition("{question}")
        texts[0]["text"] = head + texts[0]["text"]
        if parts[-1] is texts[-1]:
            parts[-1]["text"] += tail
        elif tail:
            parts.append({"type": "text", "text": tail})
    return [*before, {**last, "content": parts}]


def ask(template: str, item: Item) -> str:
    # not str.format: a question may have braces, and so may a template of one's own
    return template.replace("{question}", item.question)


def controlled_images(items: Sequence[Item], control: str, seed: int) -> list[ImageRef | None]:
    """The first image that each item is asked about."""
    return [next(iter(shown), None) for shown in controlled_pictures(items, control, seed)]


def controlled_pictures(items: Sequence[Item], control: str, seed: int) -> list[tuple[ImageRef | None, ...]]:
    """The images that each item is asked about, one for each of its own. shuffled: a permutation of all images that
    leaves no item one of its own.

    Missing pictures stay where they are, so that the same questions fail whatever the control.
    """
    if control == "none":
        return [item.images for item in items]
    if control == "blind":
        return [tuple(image if isinstance(image, MissingImage) else None for image in item.images) for item in items]
    slots: list[list[ImageRef | None]] = [[*item.images] or [None] for item in items]
    places = [
        (number, place)
        for number, some in enumerate(slots)
        for place, image in enumerate(some)
        if not isinstance(image, MissingImage)
    ]
    numbers: dict[ImageRef | None, int] = {}
    own = np.array([numbers.setdefault(slots[number][place], len(numbers)) for number, place in places])
    if len(numbers) < 2:
        raise UserError("--control shuffled needs at least two different images")
    rng = np.random.default_rng(seed)
    if len(places) > len({number for number, _ in places}):
        taken = [{numbers[image] for image in slots[number] if image in numbers} for number, _ in places]
        dealt = _exchanged(own, taken, rng)
    else:
        dealt = _shuffled(own, rng).tolist()
    pictures, shown = list(numbers), [[*some] for some in slots]
    for (number, place), which in zip(places, dealt, strict=True):
        shown[number][place] = pictures[which]
    return [tuple(some) for some in shown]


def _exchanged(own: np.ndarray, taken: Sequence[set[int]], rng: np.random.Generator) -> list[int]:
    """A permutation of `own` that has at each place none of the numbers that are `taken` there, its own among them."""
    for _ in range(TRIES):
        found = rng.permutation(own).tolist()
        for i, mine in enumerate(taken):
            if found[i] not in mine:
                continue
            drawn = chain(rng.integers(len(found), size=DRAWS).tolist(), rng.permutation(len(found)).tolist())
            j = next((j for j in drawn if found[j] not in mine and found[i] not in taken[j]), None)
            if j is not None:
                found[i], found[j] = found[j], found[i]
        if all(one not in mine for one, mine in zip(found, taken, strict=True)):
            return found
    raise UserError("--control shuffled: some images belong to too many of the items to be exchanged")


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
