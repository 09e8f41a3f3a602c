"""`columns`: keys of a row that are named by people, not by a format: {"question": "q", "image": ["left", "right"]}."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from data.row_keys import SPELLINGS, meaning_of
from data.unread import is_empty
from vlm.errors import UserError
from vlm.settings import nearest

KeyMap = tuple[tuple[str, tuple[str, ...]], ...]  # what is read, and the keys that it is read from
_LEADS = {"messages", "conversations", "question", "captions", "text", "texts"}
_ASKED = {"question", "instruction", "prompt", "input", "text"}
_OWN = {"captions": "caption"}
NAMES = ("image", "images", "caption", "answers", *SPELLINGS, "id", "kind", "ignore")


def key_map(columns: Mapping[str, str | Iterable[str]], source: str) -> KeyMap:
    """The map of a recipe or a command line; UserError for a name that nothing is read by."""
    made: dict[str, tuple[str, ...]] = {}
    for name, keys in columns.items():
        if name not in NAMES:
            raise UserError(f"{source}: nothing is read by the name {name!r}; {nearest(name, NAMES)}")
        given = (keys,) if isinstance(keys, str) else tuple(keys)
        if not given or not all(given):
            raise UserError(f"{source}.{name}: needs the name of a key")
        if len(given) > 1 and name not in ("image", "images", "ignore"):
            raise UserError(f"{source}.{name}: one key is read as {name}, not {len(given)}")
        made[name] = given
    every = [key for keys in made.values() for key in keys]
    if twice := sorted({key for key in every if every.count(key) > 1}):
        raise UserError(f"{source}: the key {twice[0]} is named twice")
    return tuple(made.items())


def read_key_map(given: Iterable[str], source: str) -> KeyMap:
    """Of NAME=KEY texts; several keys of images are named one after another, or with a + between them."""
    made: dict[str, list[str]] = {}
    for one in given:
        name, equals, key = one.partition("=")
        if not equals or not name or not key:
            raise UserError(f"{source} {one!r}: write it as NAME=KEY, such as image=picture or question=q")
        made.setdefault(name.strip(), []).extend(key.split("+") if name in ("image", "images", "ignore") else [key])
    return key_map(made, source)


@lru_cache(maxsize=4096)
def _plan(keys: tuple[str, ...], columns: KeyMap) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The row's own keys that stay, and those that give way to what the map names."""
    mapped = {name: names for name, names in columns if name != "ignore"}
    taken = {key for _, names in columns for key in names}
    meanings = {meaning_of(name) or name for name in mapped}
    leads = _LEADS if meanings & _LEADS else set()
    away = meanings | leads | (_ASKED if meanings & {"question", "messages", "conversations"} else set())
    away |= {"choices"} if "choices" in meanings else set()
    away -= {"prompt"} if "captions" in meanings and "question" not in meanings else set()
    kept = tuple(key for key in keys if key not in taken and meaning_of(key) not in away and key not in mapped)
    return kept, tuple(key for key in keys if key not in kept and (key not in taken or key in _ignored(columns)))


def _ignored(columns: KeyMap) -> tuple[str, ...]:
    return next((names for name, names in columns if name == "ignore"), ())


def renamed(row: dict[str, Any], columns: KeyMap) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row with the names of formats for its keys, and the keys that are left out for it.

    A key with dots is looked for inside of objects, too.
    """
    kept, dropped = _plan(tuple(row), columns)
    made: dict[str, Any] = {}
    for name, keys in columns:
        if name == "ignore":
            continue
        values = [value for key in keys if (value := find_key(row, key)) is not None]
        if name in ("image", "images") and len(keys) > 1:
            made["images"] = [one for value in values for one in (value if isinstance(value, list) else [value])]
        elif values:
            made[_target(name, values[0])] = values[0]
    return {**{key: row[key] for key in kept}, **made}, dropped


def _target(name: str, value: Any) -> str:
    return "images" if name == "image" and isinstance(value, list) else _OWN.get(name, name)


def find_key(row: dict[str, Any], key: str) -> Any:
    if key in row or "." not in key:
        return row.get(key)
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def unmapped(row: dict[str, Any], columns: KeyMap) -> str:
    """What is wrong with a row of which the map finds nothing that tells a format; empty for one without a map."""
    lacks = [
        f"{key} ({name})" for name, keys in columns if name != "ignore" for key in keys if is_empty(find_key(row, key))
    ]
    if not lacks:
        return ""
    has = ", ".join(map(str, row))[:200] or "none"
    return f"unknown kind of row: columns reads {', '.join(lacks)}, and it has nothing of that (keys: {has})"


def check_keys(columns: KeyMap, rows: Iterable[Any], source: str) -> None:
    """UserError for a key that none of the rows has: its name is likely misspelt."""
    wanted = {key: name for name, keys in columns for key in keys}
    seen: dict[str, None] = {}
    for row in rows:
        if isinstance(row, dict):
            seen.update(dict.fromkeys(map(str, row)))
            wanted = {key: name for key, name in wanted.items() if key not in row and find_key(row, key) is None}
        if not wanted:
            return
    if seen:
        key, name = next(iter(wanted.items()))
        raise UserError(f"{source}: columns: {{{name}: {key}}}: no row has the key {key}; {nearest(key, seen)}")
