"""Where pictures stand in texts: `<image>` and its relatives, and pictures named inside of a text."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data.records import IMAGE_PART, text_part
from vlm.errors import UserError

Part = dict[str, Any]
MARK = re.compile(r"<image>|<\|image\|>|<\|image_(?P<phi>\d+)\|>|<image[ _-]?(?P<number>\d+)>")
NAMED = re.compile(r"<img>(?P<name>[^<>\n]+)</img>")
_ALONE = re.compile(r"^[ \t]*(?:<image>[ \t]*)+$", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """What an image part shows: a picture that is named there (`image`), the row's picture `index` (from 0 on), or the
    next one of the row's."""

    image: Any = None
    index: int | None = None


@dataclass(frozen=True)
class Placed:
    """A content's parts, and what its image parts show, in order."""

    parts: list[Part]
    shown: list[Shown]


def split_text(text: str, marks: bool) -> Placed:
    """Qwen-VL's `<img>a.jpg</img>` is a picture; with `marks`, so are `<image>` and its relatives.

    A line end between a mark and what stands beside it belongs to the mark, as LLaVA writes it.
    """
    if "<" not in text:
        return Placed([text_part(text)], [])
    found = [(match, Shown(match["name"].strip())) for match in NAMED.finditer(text)]
    if marks:
        for match in MARK.finditer(text):
            number = match["phi"] or match["number"]
            found.append((match, Shown(index=int(number[:9]) - 1) if number else Shown()))
    if not found:
        return Placed([text_part(text)], [])
    found.sort(key=lambda one: one[0].start())
    parts: list[Part] = []
    start = 0
    for place, (match, shown) in enumerate(found):
        piece = text[start : match.start()]
        # of one named in the text the lines are its own
        before = found[place - 1][1] if place else None
        piece = piece.removeprefix("\n") if before is not None and before.image is None else piece
        piece = piece.removesuffix("\n") if shown.image is None else piece
        parts += [text_part(piece)] if piece else []
        parts.append(IMAGE_PART)
        start = match.end()
    rest = text[start:]
    rest = rest.removeprefix("\n") if found[-1][1].image is None else rest
    parts += [text_part(rest)] if rest else []
    return Placed(parts, [shown for _, shown in found])


def stands_alone(text: str) -> bool:
    """Whether a mark has a line of the text for itself: it stands for a picture, and is no word."""
    return "<image>" in text and _ALONE.search(text) is not None


def resolve(where: str, shown: Iterable[Shown], given: list[Any], said: str) -> list[Any]:
    """The pictures of image parts in order: those named in them, and of `given` the next ones or those of an index.

    UserError where they aren't as many as `given`. said: a text of the row, for the error.
    """
    shown = list(shown)
    open_ = [one for one in shown if one.image is None]
    numbered = [one.index for one in open_ if one.index is not None]
    if numbered and len(numbered) < len(open_):
        raise UserError(f"{where}: some image placeholders have numbers and some have none; number all, or none")
    if numbered:
        for index in numbered:
            if not 0 <= index < len(given):
                raise UserError(
                    f"{where}: an image placeholder asks for image {index + 1} of {len(given)}{_told(said, given)}"
                )
        if unshown := [number + 1 for number in range(len(given)) if number not in numbered]:
            raise UserError(f"{where}: image {unshown[0]} has no placeholder{_told(said, given)}")
    elif len(open_) != len(given):
        raise UserError(f"{where}: {len(open_)} image placeholders, but {len(given)} images{_told(said, given)}")
    rest = iter(given)
    return [
        one.image if one.image is not None else given[one.index] if one.index is not None else next(rest)
        for one in shown
    ]


def _told(said: str, given: list[Any]) -> str:
    names = ", ".join(str(image) for image in given)
    return f": {said[:80]!r} with {names[:80]!r}" if given else f": {said[:80]!r}"
