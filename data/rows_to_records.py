"""From turns to a Record: pictures get their places, a system text of the row comes first."""

from collections.abc import Sequence

from data.marks import Turn
from data.records import Record, make_record
from data.row import Row
from data.turns import build


def make_chat(
    row: Row, turns: list[Turn], captions: Sequence[str] = (), answers: Sequence[str] = (), place: bool = True
) -> Record:
    """UserError for whatever isn't sound."""
    given = row.pictures()
    messages, images = build(turns, row.where, given, place, row.text("system"), row.ignored)
    if given and any(image not in images for image in given):  # it's named otherwise in the texts
        row.ignored.update(key for group in row.layout.images for key in group)
    return make_record(
        row.where, messages, images, row.root, captions, answers=answers, ignored=row.ignored, lenient=row.lenient
    )
