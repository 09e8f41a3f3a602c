"""Reads the generator's English back, independently of how it was made."""

import re
from collections import Counter

from data.scenes import COLOURS, SHAPES, SIZES, Scene, Thing


def described(scene: Scene, words: str) -> list[Thing]:
    """The objects that words like "small red circle" or "objects in the northwest" fit."""
    words = words.removeprefix("the ").removeprefix("a ")
    what, _, place = words.partition(" in the ")
    fitting = list(scene)
    for word in what.split():
        word = word.removesuffix("s")
        assert word in (*SIZES, *COLOURS, *SHAPES, "object"), word
        if word != "object":
            fitting = [t for t in fitting if word in (t.size, t.colour, t.shape)]
    return [t for t in fitting if not place or t.place == place]


def only(scene: Scene, words: str) -> Thing:
    found = described(scene, words)
    assert len(found) == 1, f"{words!r} fits {len(found)} of {scene}"
    return found[0]


def answer_of(scene: Scene, question: str) -> str:
    """Answers by reading the question, independently of how it was made."""
    if match := re.fullmatch(r"what (color|shape) is (the .+)\?", question):
        thing = only(scene, match[2])
        return thing.colour if match[1] == "color" else thing.shape
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(described(scene, match[1])))
    if match := re.fullmatch(r"is there (a .+)\?", question):
        return "yes" if described(scene, match[1]) else "no"
    if match := re.fullmatch(r"is (the .+) larger than (the .+)\?", question):
        sizes = [only(scene, words).size for words in match.groups()]
        assert sizes[0] != sizes[1]
        return "yes" if sizes[0] == "large" else "no"
    if match := re.fullmatch(r"are there more (.+) than (.+)\?", question):
        counts = [len(described(scene, words)) for words in match.groups()]
        assert counts[0] != counts[1]
        return "yes" if counts[0] > counts[1] else "no"
    if match := re.fullmatch(r"what is in the (\w+)\?", question):
        there = [f"{t.size} {t.colour} {t.shape}" for t in scene if t.place == match[1]]
        return there[0] if there else "nothing"
    if " from " not in question:
        match = re.fullmatch(r"where is (the .+)\?", question)
        assert match, question
        return only(scene, match[1]).place
    match = re.fullmatch(r"where is (the .+) from (the .+)\?", question)
    assert match, question
    one, two = (only(scene, words).place for words in match.groups())
    if one[:5] == two[:5]:
        return "left" if one.endswith("west") else "right"
    assert one[5:] == two[5:], "neither in a row nor in a column"
    return "above" if one.startswith("north") else "below"


def parse(caption: str) -> Counter[Thing]:
    """The objects a caption names."""
    words = r"(?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+)"
    place = r"(?P<place>\w+)"
    pattern = f"{place} {words}" if caption.startswith(("north", "south")) else f"{words} {place}"
    found = list(re.finditer(pattern, caption))
    assert re.sub(pattern, "x", caption) == ", ".join("x" * len(found)), caption
    return Counter(Thing(**match.groupdict()) for match in found)
