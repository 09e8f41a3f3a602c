"""Where pictures stand in texts: `<image>` and its relatives, and pictures named inside of a text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.records import IMAGE_PART, text_part
from vlm.errors import UserError

Part = dict[str, Any]
_MARKS = (
    r"<image\s*/?>|<\|image\|>|<\|image_(?P<phi>\d+)\|>|<image[ _:-]?(?P<number>\d+)>|<ImageHere>|<image_placeholder>"
    r"|(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?|<start_of_image>|<image_soft_token>|<IMG_CONTEXT>"
    r"|\[IMG\]"
)
MARK = re.compile(_MARKS, re.IGNORECASE)
NAMED = re.compile(r"<img>(?P<name>[^<>\n]+)</img>")
_ALONE = re.compile(rf"^[ \t]*(?:(?:{_MARKS})[ \t]*)+$", re.MULTILINE | re.IGNORECASE)


@dataclass(slots=True)
class Turn:
    """role, and the text or list of parts as written; images: that the turn itself names; weight 0: not learned."""

    role: str
    content: str | list[Any]
    images: list[Any] = field(default_factory=list)
    weight: int = 1


class Shown(NamedTuple):
    """What an image part shows: a picture that is named there (`image`), the row's picture `number` (from 0 on), or the
    next one of the row's."""

    image: Any = None
    number: int | None = None


_NEXT = Shown()


class Placed(NamedTuple):
    """A content's parts, and what its image parts show, in order."""

    parts: list[Part]
    shown: list[Shown]


def split_text(text: str, marks: bool) -> Placed:
    """Qwen-VL's `<img>a.jpg</img>` is a picture; with `marks`, so are `<image>` and its relatives.

    A line end between a mark and what stands beside it belongs to the mark, as LLaVA writes it.
    """
    if not may_have_marks(text):
        return Placed([text_part(text)], [])
    if marks and text.startswith("<image>\n") and text.rfind("<") == 0 and len(text) > 8:  # as most are
        return Placed([IMAGE_PART, text_part(text[8:])], [_NEXT])
    found = [(match, Shown(match["name"].strip())) for match in NAMED.finditer(text)]
    if marks:
        for match in MARK.finditer(text):
            number = match["phi"] or match["number"]
            found.append((match, Shown(number=int(number[:9]) - 1) if number else Shown()))
    if not found:
        return Placed([text_part(text)], [])
    found.sort(key=lambda one: one[0].start())
    parts: list[Part] = []
    start, eats = 0, False  # whether the mark before takes the line end behind it
    for match, shown in found:
        # one with a number may be a word of a line, one with a name always is
        alone = shown.number is not None and (not match.start() or text[match.start() - 1] == "\n")
        plain = alone or (shown.number is None and shown.image is None)
        piece = text[start : match.start()]
        piece = piece.removeprefix("\n") if eats else piece
        piece = piece.removesuffix("\n") if plain else piece
        parts += [text_part(piece)] if piece else []
        parts.append(IMAGE_PART)
        start, eats = match.end(), plain
    rest = text[start:].removeprefix("\n") if eats else text[start:]
    parts += [text_part(rest)] if rest else []
    return Placed(parts, [shown for _, shown in found])


def may_have_marks(text: str) -> bool:
    """A quick look."""
    return "<" in text or "[" in text


def stands_alone(text: str) -> bool:
    """Whether a mark has a line of the text for itself: it stands for a picture, and is no word."""
    return may_have_marks(text) and _ALONE.search(text) is not None


def resolve(where: str, shown: Sequence[Shown], given: list[Any], turns: Sequence[Turn]) -> list[Any]:
    """The pictures of image parts in order: those named in them, and of `given` the next ones or those of an index.

    UserError where they aren't as many as `given`. turns: what is said beside them, for the error.
    """
    if len(shown) == len(given) == 1 and shown[0] == _NEXT:
        return given
    open_ = [one for one in shown if one.image is None]
    numbered = [one.number for one in open_ if one.number is not None]
    if numbered and len(numbered) < len(open_):
        raise UserError(f"{where}: some image placeholders have numbers and some have none; number all, or none")
    if numbered:
        for index in numbered:
            if not 0 <= index < len(given):
                raise UserError(
                    f"{where}: an image placeholder asks for image {index + 1} of {len(given)}{_told(turns, given)}"
                )
        if unshown := [number + 1 for number in range(len(given)) if number not in numbered]:
            raise UserError(f"{where}: image {unshown[0]} has no placeholder{_told(turns, given)}")
    elif len(open_) != len(given):
        raise UserError(f"{where}: {len(open_)} image placeholders, but {len(given)} images{_told(turns, given)}")
    rest = iter(given)
    return [
        one.image if one.image is not None else given[one.number] if one.number is not None else next(rest)
        for one in shown
    ]


def asked(turns: Sequence[Turn]) -> str:
    """The beginning of what users say."""
    return " ".join(text for turn in turns if turn.role == "user" for text in texts_of(turn))[:80]


def texts_of(turn: Turn) -> Iterator[str]:
    if isinstance(turn.content, str):
        yield turn.content
        return
    for part in turn.content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def _told(turns: Sequence[Turn], given: list[Any]) -> str:
    names = ", ".join(str(image) for image in given)
    return f": {asked(turns)!r} with {names[:80]!r}" if given else f": {asked(turns)!r}"
