"""Turns of chats, in the spellings that people have: roles, texts, parts, pictures, and what isn't learned."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data.marks import Part, Placed, Shown, Turn, asked, may_have_marks, resolve, split_text, stands_alone, texts_of
from data.records import IMAGE_PART, ROLES, Message, text_part
from data.row import kind_of, listed
from data.row_keys import REFUSED, is_picture_key, plain_key
from data.unread import base_names, check_media, is_address, is_empty, is_no_picture, media_names
from vlm.errors import UserError

_ROLES = {**{role: role for role in ROLES}, "developer": "system", "human": "user", "gpt": "assistant"}
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_UNLEARNED_KEY = "mask"  # true where a turn isn't learned; the others say 0 or false then
_WEIGHT_KEYS = ("weight", "train", "loss", "loss_weight", "loss_scale", "trainable", "train_on_turn", _UNLEARNED_KEY)
_NAMES_OF_IMAGES = ("image", "image_url", "url", "path", "file_name", "base64")
_FIRST_KIND = {"messages": "message", "llava": "turn"}


@dataclass(frozen=True)
class _Keys:
    role: str | None
    text: str | None
    weight: str | None
    images: tuple[str, ...]
    refused: tuple[str, ...]
    unread: tuple[str, ...]
    plain: bool  # a role and a text, and nothing else


@lru_cache(maxsize=1024)
def _keys_of(keys: tuple[str, ...]) -> _Keys:
    role, text, weight = (
        next((key for key in names if key in keys), None) for names in (_ROLE_KEYS, _TEXT_KEYS, _WEIGHT_KEYS)
    )
    rest = [key for key in keys if key not in (role, text, weight)]
    images = tuple(key for key in rest if is_picture_key(key))
    refused = tuple(key for key in rest if plain_key(key) in REFUSED)
    unread = tuple(key for key in rest if key not in images and key not in refused)
    return _Keys(role, text, weight, images, refused, unread, role is not None and text is not None and len(keys) == 2)


def read_turns(given: Any, kind: str, where: str, ignored: set[str]) -> list[Turn]:
    """The turns of `messages` or (kind: llava) `conversations`. ignored: gets the keys that are left out."""
    noun, name = _FIRST_KIND[kind], "messages" if kind == "messages" else "conversations"
    if not isinstance(given, list):
        raise UserError(f"{where}: {name} must be a list, not {kind_of(given)}")
    turns = []
    for number, turn in enumerate(given, start=1):
        if type(turn) is dict and (keys := _keys_of(tuple(turn))).plain:  # most are, and rows are many
            role, content = turn[keys.role], turn[keys.text]
            if type(role) is str and role in _ROLES and type(content) in (str, list):
                turns.append(Turn(_ROLES[role], content))
                continue
        turns.append(read_turn(turn, kind, f"{where}: {noun} {number}", ignored))
    return turns


def read_turn(turn: Any, kind: str, where: str, ignored: set[str]) -> Turn:
    keys = _keys_of(tuple(turn)) if isinstance(turn, dict) else None
    role = turn.get(keys.role) if keys is not None and keys.role is not None else None
    role = _ROLES.get(role) if isinstance(role, str) else None
    if keys is None or role is None:
        if keys is not None and (calls := [key for key in keys.refused if not is_empty(turn[key])]):
            raise UserError(f"{where}: the key {calls[0]}: {REFUSED[plain_key(calls[0])]}")
        due = f"a role of {', '.join(ROLES)}" if kind == "messages" else "a 'from' of human or gpt and a text 'value'"
        raise UserError(f"{where} needs {due}, got {str(turn)[:80]!r}")
    content = turn.get(keys.text) if keys.text is not None else None
    for key in keys.refused:
        if not is_empty(turn[key]):
            raise UserError(f"{where}: the key {key}: {REFUSED[plain_key(key)]}")
    images = [image for key in keys.images if not is_no_picture(turn[key]) for image in listed(turn[key])]
    if keys.unread:
        check_unread_of_part(turn, keys.unread, where, images, ignored, "a turn")
    if not isinstance(content, (str, list)):
        if kind == "llava":
            raise UserError(f"{where} needs a 'from' of human or gpt and a text 'value', got {str(turn)[:80]!r}")
        raise UserError(f"{where}: content must be text or a list of parts, not {type(content).__name__}")
    return Turn(role, content, images, _weight(turn, keys.weight, role, where))


def check_unread_of_part(
    held: dict[str, Any], keys: tuple[str, ...], where: str, images: list[Any], ignored: set[str], of: str
) -> None:
    """UserError for media in keys that aren't read; the others are noted, where they hold something."""
    for key in keys:
        if not is_empty(held[key]):
            check_media(key, list(media_names(held[key])), where, images)
            ignored.add(f"{key} of {of}")


def _weight(turn: dict[str, Any], key: str | None, role: str, where: str) -> int:
    given = turn[key] if key is not None else None
    if given is None:
        return 1
    if not isinstance(given, (int, float)) or given not in (0, 1):
        learned, not_learned = ("false", "true") if key == _UNLEARNED_KEY else ("1", "0")
        raise UserError(f"{where}: {key} must be {not_learned} (not learned) or {learned}, got {str(given)[:40]!r}")
    if key == _UNLEARNED_KEY:
        return 1 - int(given)
    if given == 1 and role != "assistant":
        raise UserError(f"{where}: {key} 1 of a {role} turn: only what assistants say is learned; remove it")
    return int(given)


def build(
    turns: list[Turn], where: str, given: list[Any], place: bool, system: str | None, ignored: set[str]
) -> tuple[list[Message], list[Any]]:
    """Messages with image parts, and the pictures that these show.

    given: pictures that the row names beside its turns. Marks in users' texts stand for them. Where there is no mark,
    they stand at the beginning of the first user's turn (`place`), as LLaMA-Factory and ms-swift have it. Without such
    pictures a mark inside of a line is a word.
    """
    words = False
    if given:
        lists = [turn for turn in turns if type(turn.content) is list]
        words = bool(lists) and (sum(map(_open_parts, lists)) == len(given) or _shows_by_name(lists, given))
    messages: list[Message] = []
    every: list[Shown] = []
    for number, turn in enumerate(turns, start=1):
        if turn.role == "user" or turn.images or not isinstance(turn.content, str):
            marks = turn.role == "user" and not words and (bool(given) or bool(turn.images) or not place)
            if type(turn.content) is str and not turn.images:
                placed = split_text(turn.content, marks)
            else:
                at = f"{where}: message {number}"
                placed = _placed(turn, marks, at, ignored)
                placed = _own(placed, turn, at) if turn.images else placed
            parts = placed.parts
            if placed.shown:
                every += placed.shown
        else:
            parts = [text_part(turn.content)]
        message: Message = {"role": turn.role, "content": parts}
        if turn.weight == 0 and turn.role == "assistant":
            message["weight"] = 0
        messages.append(message)
    if system is not None:
        messages = _with_system(messages, system, where)
    if every and (words or not given) and place and _has_marks_alone(turns):
        raise UserError(f"{where}: an <image> in the text beside image parts: leave one of both out: {asked(turns)!r}")
    if not given:
        if every:
            return messages, resolve(where, every, given, turns)
        if place and _has_marks_alone(turns):
            raise UserError(f"{where}: an <image> in the text, but no picture is named in the row: {asked(turns)!r}")
        return messages, []
    named = [one.image for one in every if one.image is not None] if every else []
    if named and len(named) == len(every) and _are_beside(given, named):
        return messages, named  # which are named beside once more
    if place and len(named) == len(every):
        for message in messages:
            if message["role"] == "user":
                message["content"] = [*[IMAGE_PART] * len(given), *message["content"]]
                return messages, [*given, *named]
    return messages, resolve(where, every, given, turns)


def _has_marks_alone(turns: list[Turn]) -> bool:
    return any(turn.role == "user" and any(map(stands_alone, texts_of(turn))) for turn in turns)


def _placed(turn: Turn, marks: bool, where: str, ignored: set[str]) -> Placed:
    if isinstance(turn.content, str):
        return split_text(turn.content, marks)
    parts: list[Part] = []
    shown: list[Shown] = []
    for part in turn.content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and len(part) == 2 and isinstance(part.get("text"), str) and turn.role != "user":
            parts.append(text_part(part["text"]))
        elif kind in _IMAGE_PARTS:
            shown.append(_image_of(part, where, ignored))
            parts.append(IMAGE_PART)
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            _check_part(part, ("type", "text"), where, ignored)
            if turn.role == "user" and may_have_marks(part["text"]):
                inner = split_text(part["text"], marks)
                parts += inner.parts
                shown += inner.shown
            else:
                parts.append(text_part(part["text"]))
        else:
            raise UserError(f"{where}: a part is of type text (with a text) or image, got {str(part)[:80]!r}")
    return Placed(parts, shown)


def _image_of(part: dict[str, Any], where: str, ignored: set[str]) -> Shown:
    if len(part) == 2 and isinstance(part.get("image"), str):
        return Shown(part["image"])
    named = [(key, part[key]) for key in _NAMES_OF_IMAGES if part.get(key) is not None]
    index = part.get("index")
    _check_part(part, ("type", "index", "text", *_NAMES_OF_IMAGES), where, ignored)
    if not is_empty(part.get("text")):
        raise UserError(f"{where}: a part of type {part['type']} has a text, too; make two parts of it")
    if len(named) > 1:
        raise UserError(f"{where}: an image part names its image twice, by {named[0][0]} and {named[1][0]}")
    if named:
        value = named[0][1]
        return Shown(value.get("url") if isinstance(value, dict) and "url" in value else value)
    if index is None:
        return Shown()
    if type(index) is not int:
        raise UserError(f"{where}: the index of an image part is a whole number, got {str(index)[:40]!r}")
    return Shown(number=index)


def _check_part(part: dict[str, Any], known: tuple[str, ...], where: str, ignored: set[str]) -> None:
    if len(part) == 2 and "text" in part:
        return
    unread = tuple(key for key in part if key not in known)
    check_unread_of_part(part, unread, where, [], ignored, "a part")


def _own(placed: Placed, turn: Turn, where: str) -> Placed:
    """A turn with pictures of its own: its marks stand for these; without marks they come first."""
    if turn.role != "user":
        raise UserError(f"{where}: an image in {'an assistant' if turn.role == 'assistant' else 'a system'} message")
    if not any(one.image is None for one in placed.shown):
        return Placed([*[IMAGE_PART] * len(turn.images), *placed.parts], [*map(Shown, turn.images), *placed.shown])
    found = resolve(where, placed.shown, turn.images, [turn])
    return Placed(placed.parts, [Shown(image) for image in found])


def _open_parts(turn: Turn) -> int:
    """Image parts that name no picture, of which a row of such parts has one for each of its pictures."""
    content = turn.content if isinstance(turn.content, list) else []
    return sum(
        isinstance(part, dict)
        and part.get("type") in _IMAGE_PARTS
        and all(part.get(key) is None for key in _NAMES_OF_IMAGES)
        for part in content
    )


def _shows_by_name(turns: list[Turn], given: list[Any]) -> bool:
    """Whether image parts show all pictures by name, so that a mark beside them is a word."""
    contents = [turn.content for turn in turns if isinstance(turn.content, list)]
    named = [
        part[key]
        for content in contents
        for part in content
        if isinstance(part, dict) and part.get("type") in _IMAGE_PARTS
        for key in _NAMES_OF_IMAGES
        if isinstance(part.get(key), str)
    ]
    return bool(named) and _are_beside(given, named)


def _are_beside(given: list[Any], named: list[Any]) -> bool:
    """Whether the row's pictures are those that its texts name, or addresses beside them."""
    return base_names(image for image in given if not is_address(image)) <= base_names(named)


def _with_system(messages: list[Message], system: str, where: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        if "".join(part.get("text", "") for part in messages[0]["content"]) != system:
            raise UserError(f"{where}: two system texts, one of the row and one of its messages; leave one out")
        return messages
    return [{"role": "system", "content": [text_part(system)]}, *messages]
