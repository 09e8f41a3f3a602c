"""Questions about scenes, of six kinds, with answers of one word.

For each kind, all questions a scene allows are listed by answer; then an answer is drawn, then a wording. So
answers are balanced by construction and not by the accidents of what scenes show.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from typing import Final, NamedTuple

import numpy as np

from data.scenes.world import COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, Thing, pick, shuffled

YES_NO: Final = ("yes", "no")
ANSWERS: Final = {
    "colour": COLOURS,
    "shape": SHAPES,
    "count": ("0", "1", "2", "3", "4"),
    "existence": YES_NO,
    "relation": ("left", "right", "above", "below", *PLACES),
    "comparison": YES_NO,
}
KINDS: Final = tuple(ANSWERS)

# Few scenes allow a count of three or four: where they do, it is asked for more often.
_COUNT_WEIGHT: Final = {"0": 0.5, "1": 0.65, "2": 1.6, "3": 3.0, "4": 6.0}

_RARER: Final = frozenset(colour for colour, _ in HELD_OUT)

Candidates = dict[str, list[list[str]]]
"""answer -> groups of questions; the group is drawn first, so long groups don't crowd out short ones."""

Keep = Callable[[str], bool]
"""Which questions may be asked, by their texts."""


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


def refer(thing: Thing, fields: Iterable[str]) -> str:
    """The words that name an object by some of its fields, e.g. "small circle", "object in the northwest"."""
    known = {field: getattr(thing, field) for field in fields}
    words = [known[field] for field in ("size", "colour") if field in known]
    words.append(known.get("shape", "object"))
    if "place" in known:
        words.append(f"in the {known['place']}")
    return " ".join(words)


def _is_unique(scene: Scene, thing: Thing, fields: tuple[str, ...]) -> bool:
    wanted = [getattr(thing, field) for field in fields]
    return sum([getattr(other, field) for field in fields] == wanted for other in scene) == 1


def _attribute(scene: Scene, focus: Thing | None, asked: str, question: str) -> Candidates:
    other = "shape" if asked == "colour" else "colour"
    found: Candidates = {}
    for fields in ((), (other,), ("size", other), ("place",), ("size",)):
        by_answer: dict[str, list[str]] = {}
        for thing in scene if focus is None else (focus,):
            if _is_unique(scene, thing, fields):
                text = f"{question} is the {refer(thing, fields)}?"
                by_answer.setdefault(getattr(thing, asked), []).append(text)
        for answer, texts in by_answer.items():
            found.setdefault(answer, []).append(texts)
    return found


def _colour(scene: Scene, focus: Thing | None) -> Candidates:
    return _attribute(scene, focus, "colour", "what color")


def _shape(scene: Scene, focus: Thing | None) -> Candidates:
    return _attribute(scene, focus, "shape", "what shape")


def _count(scene: Scene, focus: Thing | None) -> Candidates:
    colours, shapes = Counter(t.colour for t in scene), Counter(t.shape for t in scene)
    groups = [
        [("objects", len(scene))],
        [(f"{shape}s", shapes[shape]) for shape in SHAPES if focus is None or shape == focus.shape],
        [(f"{c} objects", colours[c]) for c in COLOURS if focus is None or c == focus.colour],
    ]
    found: Candidates = {}
    for group in groups:
        by_answer: dict[str, list[str]] = {}
        for what, number in group:
            by_answer.setdefault(str(number), []).append(f"how many {what} are there?")
        for answer, texts in by_answer.items():
            found.setdefault(answer, []).append(texts)
    return found


def _existence(scene: Scene, focus: Thing | None) -> Candidates:
    pairs = {thing.pair for thing in scene}
    sized = {(thing.size, *thing.pair) for thing in scene}
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    # Training must not learn that held-out pairs don't exist, so it never asks for them.
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs and (focus or (c, s) not in HELD_OUT)]
    if focus is not None:
        absent = [(c, s) for c, s in absent if c == focus.colour or s == focus.shape]
    # Colour and shape are both there, only not together; else one of them is.
    hard = [(c, s) for c, s in absent if c in colours and s in shapes]
    hard = hard or [(c, s) for c, s in absent if c in colours or s in shapes]
    if focus is None:
        # A colour with a held-out pair is seen more often per remaining pair and can be denied less often;
        # without this, the wording alone would tell yes from no.
        hard += [(c, s) for c, s in hard if c in _RARER]
    present = scene if focus is None else (focus,)
    resized = [(size, *t.pair) for t in present for size in SIZES if (size, *t.pair) not in sized]
    resized += [(size, *pair) for pair in hard for size in SIZES]
    return {
        "yes": [
            [f"is there a {c} {s}?" for c, s in dict.fromkeys(t.pair for t in present)],
            [f"is there a {t.size} {t.colour} {t.shape}?" for t in dict.fromkeys(present)],
        ],
        "no": [
            [f"is there a {c} {s}?" for c, s in hard],
            [f"is there a {size} {c} {s}?" for size, c, s in dict.fromkeys(resized)],
        ],
    }


def _direction(thing: Thing, other: Thing) -> str | None:
    (row, column), (other_row, other_column) = (divmod(PLACES.index(t.place), 2) for t in (thing, other))
    if row == other_row:
        return "left" if column < other_column else "right"
    if column == other_column:
        return "above" if row < other_row else "below"
    return None


def _relation(scene: Scene, focus: Thing | None) -> Candidates:
    found: Candidates = {}
    names: dict[Thing, str] = {}
    for thing in scene:
        for fields in (("colour", "shape"), ("size", "colour", "shape")):
            if thing not in names and _is_unique(scene, thing, fields):
                names[thing] = refer(thing, fields)
    for thing, name in names.items():
        if focus in (None, thing):
            found.setdefault(thing.place, [[]])[0].append(f"where is the {name}?")
    for thing, other in permutations(names, 2):
        direction = _direction(thing, other)
        if direction is not None and focus in (None, thing, other):
            text = f"where is the {names[thing]} from the {names[other]}?"
            found.setdefault(direction, [[]])[0].append(text)
    return found


def _comparison(scene: Scene, focus: Thing | None) -> Candidates:
    found: Candidates = {"yes": [[], [], []], "no": [[], [], []]}
    for thing, other in permutations(scene, 2):
        if thing.size == other.size or focus not in (None, thing, other):
            continue
        # Never by size, which would answer the question; by place where colour and shape don't tell.
        named = all(_is_unique(scene, t, ("colour", "shape")) for t in (thing, other))
        fields = ("colour", "shape") if named else ("place",)
        text = f"is the {refer(thing, fields)} larger than the {refer(other, fields)}?"
        found["yes" if thing.size == "large" else "no"][0].append(text)
    for group, names, counts, own in (
        (1, [(s, f"{s}s") for s in SHAPES], Counter(t.shape for t in scene), focus and focus.shape),
        (2, [(c, f"{c} objects") for c in COLOURS], Counter(t.colour for t in scene), focus and focus.colour),
    ):
        for (one, one_name), (two, two_name) in permutations(names, 2):
            if counts[one] != counts[two] and own in (None, one, two):
                text = f"are there more {one_name} than {two_name}?"
                found["yes" if counts[one] > counts[two] else "no"][group].append(text)
    return found


_KIND: Final[dict[str, Callable[[Scene, Thing | None], Candidates]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "relation": _relation,
    "comparison": _comparison,
}


def counts_colours(text: str) -> bool:
    """Whether a question of kind count or comparison is about how many objects have a colour."""
    return any(f" {colour} objects" in text for colour in COLOURS)


def names_a_place(text: str) -> bool:
    return " in the " in text


def asks_where(text: str) -> bool:
    """Whether a place is asked for: "where is the red circle?", not "where is the red circle from the blue square?"."""
    return text.startswith("where is ") and " from " not in text


def any_question(_text: str) -> bool:
    return True


def candidates(scene: Scene, kind: str, focus: Thing | None = None) -> Candidates:
    """All questions of one kind that the scene allows, by answer; with `focus`, those about that object."""
    groups = {answer: [g for g in groups if g] for answer, groups in _KIND[kind](scene, focus).items()}
    return {answer: found for answer, found in groups.items() if found}


def _draw_answer(rng: np.random.Generator, kind: str, answers: list[str]) -> str:
    if kind != "count":
        return pick(rng, answers)
    weights = [_COUNT_WEIGHT[answer] for answer in answers]
    left = rng.random() * sum(weights)
    for answer, weight in zip(answers, weights, strict=True):
        left -= weight
        if left < 0:
            return answer
    return answers[-1]


def ask(
    rng: np.random.Generator,
    scene: Scene,
    kind: str,
    *,
    answer: str | None = None,
    focus: Thing | None = None,
    keep: Keep = any_question,
) -> Question | None:
    """One question of a kind that `keep` lets pass, with the given answer or any; None if there is none."""
    kept = {a: [[t for t in g if keep(t)] for g in groups] for a, groups in candidates(scene, kind, focus).items()}
    found = {a: [g for g in groups if g] for a, groups in kept.items() if any(groups)}
    if answer is None and found:
        answer = _draw_answer(rng, kind, list(found))
    if answer is None or answer not in found:
        return None
    return Question(kind, pick(rng, pick(rng, found[answer])), answer)


def ask_many(
    rng: np.random.Generator, scene: Scene, count: int, kinds: Sequence[str] = KINDS, keep: Keep = any_question
) -> list[Question]:
    """`count` different questions, their kinds as evenly mixed as the scene allows, in random order."""
    chosen: list[Question] = []
    asked: set[str] = set()

    def is_new(text: str) -> bool:
        return text not in asked and keep(text)

    while len(chosen) < count:
        before = len(chosen)
        for kind in shuffled(rng, kinds):
            question = ask(rng, scene, kind, keep=is_new) if len(chosen) < count else None
            if question is not None:
                chosen.append(question)
                asked.add(question.text)
        if len(chosen) == before:
            raise ValueError(f"this scene allows {before} questions, {count} were asked for")
    return shuffled(rng, chosen)
