"""Keys of a row that nothing is read from: what may be left out, and what would be lost."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from data.pictures import ImageBytes, ImageSlice
from data.row_keys import WEIGHTS, Layout, meaning_of, plain_key
from vlm.errors import UserError

# how JPEG, PNG, GIF and WebP begin in base64
BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_MEDIA_TEXT = ("data:image/", "data:video/", "data:audio/")
_PICTURE_ID = re.compile(r"(image|img|picture|photo|coco)ids?")
_MEDIA_NAME = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|mpe?g|mp3|wav|flac|ogg|m4a)$",
    re.IGNORECASE,
)


def is_empty(value: Any) -> bool:
    """Nothing, as files write it."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (list, dict)):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    if isinstance(value, (bytes, ImageBytes)):
        return not (value if isinstance(value, bytes) else value.data)
    return value is None or value != value


def is_no_picture(value: Any) -> bool:
    """Nothing where a picture is named; False is nothing there, and in lists, too."""
    if isinstance(value, list):
        return all(map(is_no_picture, value))
    return value is False or is_empty(value)


def without_nothing(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row without the keys that hold nothing, and what these hold. An answer's blank text stays: it's an error."""
    empty: dict[str, Any] = {}
    for key, value in row.items():
        if value is None:
            empty[key] = value
        elif type(value) not in (int, bool) or value is False:
            meaning = meaning_of(key)
            if meaning == "image":
                if is_no_picture(value):
                    empty[key] = value
            elif meaning is not None and is_empty(value) and not _is_blank_answer(meaning, value):
                empty[key] = value
    return {key: value for key, value in row.items() if key not in empty} if empty else row, empty


def _is_blank_answer(meaning: str, value: Any) -> bool:
    return (meaning == "answer" and isinstance(value, str)) or (
        meaning == "captions" and isinstance(value, list) and "" in value
    )


def media_names(value: Any, depth: int = 3) -> Iterator[Any]:
    """What looks like a picture, a film or a sound in a value: names of files, or (as they are) bytes."""
    if isinstance(value, str):
        named = len(value) <= 512 and _MEDIA_NAME.search(value) and value.count(" ") < 4 and "\n" not in value
        if named or value.startswith(_MEDIA_TEXT) or (len(value) > 100 and value.startswith(BASE64)):
            yield value
    elif isinstance(value, (list, dict)):
        for inner in islice(value.values() if isinstance(value, dict) else value, 16) if depth else ():
            yield from media_names(inner, depth - 1)
    elif isinstance(value, (bytes, ImageBytes, ImageSlice)):
        yield value


def check_refused(data: dict[str, Any], told: Layout, where: str) -> None:
    """UserError for a key that carries meaning, or media of a kind that nothing is read of."""
    for key, why in told.refused:
        value = data[key]
        weighs = plain_key(key) in WEIGHTS
        if not (is_empty(value) or (value in (1, "1") if weighs else value is False)):
            raise UserError(f"{where}: the key {key}: {why}; columns: {{ignore: {key}}} leaves it out")
    for key in told.unknown:
        if (meant := _means_more(plain_key(key), data[key], told.format)) is not None:
            raise UserError(f"{where}: the key {key}: {meant}; columns: {{ignore: {key}}} leaves it out")


def suspects(data: dict[str, Any], told: Layout) -> list[tuple[str, list[Any]]]:
    """Keys that aren't read and hold what looks like media, and what that is."""
    found = []
    for key in told.unknown:
        value = data[key]
        if type(value) not in (int, float) and (names := list(media_names(value))):
            found.append((key, names))
    return found


def check_pictureless(data: dict[str, Any], told: Layout, where: str) -> None:
    """UserError for a key that tells of a picture, in a row without one."""
    for key in told.skipped:
        if _PICTURE_ID.fullmatch(plain_key(key)) and not is_empty(data[key]):
            raise UserError(
                f"{where}: the key {key} tells of a picture ({str(data[key])[:40]!r}), and the row names none; "
                f"columns: {{image: KEY}} names it, columns: {{ignore: {key}}} reads the row without"
            )
        check_media(key, list(media_names(data[key])), where, ())


def _means_more(name: str, value: Any, kind: str | None) -> str | None:
    """Why a row isn't what it seems with this value of a key that is harmless with others."""
    if isinstance(value, bool) and name in ("label", "ktotag") and kind in ("messages", "llava", "qa"):
        return "it says whether the answer is a good one; such rows aren't answers to learn"
    if name == "objects" and isinstance(value, dict) and not is_empty(value.get("ref")):
        return "its objects and boxes aren't put into texts; write them there, as the model is to say them"
    return None


def check_media(key: str, names: list[Any], where: str, shown: Sequence[Any]) -> None:
    """UserError for media that is none of the pictures that the row shows, nor the address of one."""
    known = base_names(shown)
    for name in names:
        if not (is_address(name) and shown) and not base_names([name]) <= known:
            held = f"names {name[:80]!r}" if isinstance(name, str) else "holds a picture or bytes"
            raise UserError(
                f"{where}: the key {key} {held}, which isn't read; columns: {{image: {key}}} reads it as a picture, "
                f"columns: {{ignore: {key}}} leaves it out"
            )


def is_address(image: Any) -> bool:
    return isinstance(image, str) and image.startswith(("http://", "https://"))


def base_names(images: Iterable[Any]) -> set[str]:
    """Names without folders, by which a picture that is named twice is known again."""
    return {str(image).replace("\\", "/").rpartition("/")[2] for image in images}
