"""Rows of the formats that people have -> Records. The format of a row is read off its keys."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.key_map import KeyMap, renamed, unmapped
from data.marks import Turn, stands_alone
from data.question_rows import most_frequent, read_question
from data.records import IMAGE_PART, Record, make_record, text_part
from data.row import Row
from data.row_keys import Layout, is_picture_key, layout, meaning_of
from data.rows_to_records import make_chat
from data.turns import check_unread_of_part, read_turns
from data.unread import check_media, check_pictureless, check_refused, is_empty, suspects, without_nothing
from vlm.errors import UserError

CAPTION_PROMPT = "describe the picture."
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
__all__ = ["CAPTION_PROMPT", "ROW_FORMATS", "SHORT_ANSWER", "most_frequent", "read_row", "row_format"]


def row_format(row: Any, wanted: str | None = None) -> str | None:
    """The name of a row's format; wanted: the one that it is to be, where it may be several."""
    if not isinstance(row, dict):
        return None
    return _understood(row, wanted)[1].format


def _understood(row: dict[str, Any], wanted: str | None) -> tuple[dict[str, Any], Layout, dict[str, Any]]:
    """The row without keys that hold nothing, what it is, and what these keys hold. Where nothing is left that tells
    a format, the keys that hold nothing do."""
    rest, empty = without_nothing(row)
    told = _layout(rest, wanted)
    if told.format is None and empty:
        nulls = {key: value for key, value in empty.items() if value is None}
        for without in ({**nulls, **{key: empty[key] for key in empty if is_picture_key(key)}}, nulls):
            some = {key: value for key, value in row.items() if key not in without}
            told = _layout(some, wanted)
            if told.format is not None:
                return some, told, without
    return rest, told, empty


def _layout(row: dict[str, Any], wanted: str | None) -> Layout:
    keys = tuple(row)
    told = layout(keys, "documents" if wanted == "turns" else wanted)
    if told.format in ("documents", None):
        texts = next((row[key] for key in keys if meaning_of(key) == "texts"), None)
        if isinstance(texts, list) and any(isinstance(text, dict) for text in texts):
            return layout(keys, "turns")
    return told


def read_row(
    row: Any, where: str, root: Path, format: str | None = None, columns: KeyMap = (), lenient: bool = False
) -> Record:
    """One parsed row -> Record; UserError with `where` for anything that isn't sound, and for a key that carries media
    or meaning and isn't read. format: what it has to be; columns: keys of other names; lenient: pictures that aren't
    there are `MissingImage`."""
    try:
        return _read(row, where, root, format, columns, lenient)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def _read(row: Any, where: str, root: Path, format: str | None, columns: KeyMap, lenient: bool) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object, not {type(row).__name__}")
    dropped: tuple[str, ...] = ()
    given = row
    if columns:
        row, dropped = renamed(row, columns)
    row, told, nulls = _understood(row, format)
    name = told.format
    if name is None:
        raise UserError(f"{where}: {unmapped(given, columns) or told.problem}")
    if format is not None and name != format:
        raise UserError(f"{where}: a row of {name}, where {format} is read")
    one = Row(row, where, root, told, lenient)
    one.nulls, one.given = nulls, given
    if dropped:
        one.ignored.update(dropped)
    record = _read_all(one, ROW_FORMATS[name]) if told.refused or told.unknown else ROW_FORMATS[name](one)
    if told.skipped and not record.images:
        check_pictureless(row, told, where)
    return record


def _read_all(row: Row, read: Callable[[Row], Record]) -> Record:
    """UserError for a key that carries media or meaning and isn't read: rather than for what is missing without it."""
    check_refused(row.data, row.layout, row.where)
    unread = suspects(row.data, row.layout)
    try:
        record = read(row)
    except UserError:
        for key, names in unread:
            check_media(key, names, row.where, ())
        raise
    for key, names in unread:
        check_media(key, names, row.where, record.images)
    return record


def _messages(row: Row) -> Record:
    """{"messages": [{"role", "content": text or [{"type": "text", "text"}, {"type": "image", "image"}]}]}

    Image parts without a name take the next of the row's pictures; "captions" are answers as right as the last one.
    """
    turns = read_turns(row.first("messages"), "messages", row.where, row.ignored)
    captions: Any = next((row.data[key] for key in row.layout.keys.get("captions", ())), [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise UserError(f"{row.where}: captions must be a list of texts, none empty")
    answers = row.value("answer") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        row.ignored.add("answers")
        answers = []
    return make_chat(row, turns, captions, answers)


def _llava(row: Row) -> Record:
    """LLaVA: {"image": path or list, "conversations": [{"from": human|gpt, "value": "<image>\\n..."}]}

    An image stays where its mark stands; LLaVA's own loader moves it to the front of its turn.
    """
    turns = read_turns(row.first("conversations"), "llava", row.where, row.ignored)
    return make_chat(row, turns, place=False)


def _captions(row: Row) -> Record:
    """{"image", "caption": text} or {"image", "captions": [text, ...]}; "text" is a caption in image folders."""
    where, keys = row.where, row.layout.keys
    key = next(key for meaning in ("captions", "text") for key in keys.get(meaning, ()))
    captions = row.data[key]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f"{where}: captions must be one text or a list of them, none empty")
    if any("<" in caption and (stands_alone(caption) or caption.startswith("<image>")) for caption in captions):
        raise UserError(f"{where}: a caption with an <image> in it: {captions[0][:80]!r}; a picture isn't said")
    others = [other for meaning in ("captions", "text") for other in keys.get(meaning, ()) if other != key]
    row.ignored.update(other for other in others if not is_empty(row.data[other]) and row.data[other] != row.data[key])
    prompt = row.key("prompt")
    asked = CAPTION_PROMPT if prompt is None else row.data[prompt]
    if not isinstance(asked, str):
        raise UserError(f"{where}: prompt must be a text, not {type(asked).__name__}")
    images = row.pictures()
    if len(images) != 1:
        raise UserError(
            f"{where}: a caption belongs to one image, and the row names {len(images)} (keys: {_keys(row)})"
        )
    return make_chat(row, [Turn("user", asked), Turn("assistant", captions[0])], captions)


def _keys(row: Row) -> str:
    return ", ".join(map(str, row.data))[:200]


def _turns(row: Row) -> Record:
    """the_cauldron and FineVision: {"images": [...], "texts": [{"user", "assistant", "source"}, ...]}"""
    texts = row.data[row.layout.keys["texts"][0]]
    turns: list[Turn] = []
    for number, pair in enumerate(texts):
        where = f"{row.where}: texts {number}"
        if not isinstance(pair, dict):
            raise UserError(f"{where} must be an object with user and assistant, not {type(pair).__name__}")
        said = [pair.get(name) for name in ("system", "user", "assistant")]
        if not all(isinstance(text, str) for text in said[1:]) or not isinstance(said[0], str | None):
            raise UserError(f"{where} needs texts for user and assistant, got {str(pair)[:80]!r}")
        unread = tuple(key for key in pair if key not in ("system", "user", "assistant"))
        check_unread_of_part(pair, unread, where, row.pictures(), row.ignored, "texts")
        turns += [Turn(role, text) for role, text in zip(("system", "user", "assistant"), said, strict=True) if text]
    return make_chat(row, turns)


def _document(row: Row) -> Record:
    """OBELICS: {"images": [path or null, ...], "texts": [text or null, ...]}, of each position one is there."""
    texts, images = row.data[row.layout.keys["texts"][0]], row.data[row.layout.images[0][0]]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise UserError(f"{row.where}: images and texts must be lists of the same length")
    parts: list[dict[str, str]] = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise UserError(f"{row.where}: position {number} needs an image or a text, and null for the other")
        parts.append(IMAGE_PART if text is None else text_part(text))
    return _make_document(row, parts, [image for image in images if image is not None])


def _matched_document(row: Row) -> Record:
    """MMC4: {"text_list": [text, ...], "image_info": [{"image_name", "matched_text_index"}]}, images before texts."""
    where, keys = row.where, row.layout.keys
    texts, infos = row.data[keys["text_list"][0]], row.data[keys["image_info"][0]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not isinstance(infos, list):
        raise UserError(f"{where}: text_list must be a list of texts, and image_info a list")
    before: list[list[Any]] = [[] for _ in texts]
    for number, info in enumerate(infos):
        place = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(place) is not int or not 0 <= place < len(texts):
            raise UserError(f"{where}: image {number} needs a matched_text_index from 0 to {len(texts) - 1}")
        before[place].append(info.get("image_name"))
    parts = [
        part
        for text, names in zip(texts, before, strict=True)
        for part in (*[IMAGE_PART] * len(names), text_part(text))
    ]
    return _make_document(row, parts, [name for names in before for name in names])


def _make_document(row: Row, parts: list[dict[str, str]], images: list[Any]) -> Record:
    messages = [{"role": "document", "content": parts}]
    return make_record(row.where, messages, images, row.root, kind="document", ignored=row.ignored, lenient=row.lenient)


def _documents(row: Row) -> Record:
    return _document(row) if "texts" in row.layout.keys and row.layout.images else _matched_document(row)


ROW_FORMATS: dict[str, Callable[[Row], Record]] = {
    "messages": _messages,
    "llava": _llava,
    "captions": _captions,
    "qa": read_question,
    "documents": _documents,
    "turns": _turns,
}
