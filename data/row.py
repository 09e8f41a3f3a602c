"""`Row`: one parsed row with what its keys mean, from which a format takes what it reads."""

from collections.abc import Iterable
from typing import Any

from data.row_keys import Layout
from data.unread import base_names, is_address, is_empty, is_no_picture
from vlm.errors import UserError


class Row:
    """data: without the keys that hold nothing, which are `nulls`; given: the keys as people wrote them; ignored: gets
    the keys that are left out; lenient: pictures may be missing."""

    __slots__ = ("_pictures", "data", "given", "ignored", "layout", "lenient", "nulls", "root", "where")

    def __init__(self, data: dict[str, Any], where: str, root: Any, layout: Layout, lenient: bool) -> None:
        self.data, self.where, self.root, self.layout, self.lenient = data, where, root, layout, lenient
        self.ignored = set(layout.unread)
        self.nulls: dict[str, Any] = {}
        self.given: Iterable[Any] = data
        self._pictures: list[Any] | None = None

    def key(self, *meanings: str) -> str | None:
        """The first key of the row that is read as one of these and holds something. Those of the same meaning that
        hold something else are left out, and noted."""
        for meaning in meanings:
            keys = self.layout.keys.get(meaning, ())
            if held := [key for key in keys if not is_empty(self.data[key])]:
                first = held[0]
                if len(held) > 1:
                    self.ignored.update(key for key in held[1:] if self.data[key] != self.data[first])
                return first
        return None

    def value(self, *meanings: str) -> Any:
        key = self.key(*meanings)
        return None if key is None else self.data[key]

    def first(self, meaning: str) -> Any:
        """Of keys that the row has, what the first holds; something, if any of them does."""
        key = self.key(meaning)
        return self.data[self.layout.keys[meaning][0] if key is None else key]

    def text(self, *meanings: str) -> str | None:
        """As text; None where there is none. Numbers and booleans are taken as JSON writes them."""
        if self.layout.keys.keys().isdisjoint(meanings):
            return None
        key = self.key(*meanings)
        return None if key is None else as_text(self.data[key], key, self.where)

    def pictures(self) -> list[Any]:
        """What the row names beside its texts, in order. UserError when two keys name different ones."""
        if not self.layout.images:
            return []
        if self._pictures is None:
            self._pictures = self._read_pictures()
        return self._pictures

    def _read_pictures(self) -> list[Any]:
        if len(self.layout.images) == 1 and len(self.layout.images[0]) == 1:
            value = self.data[self.layout.images[0][0]]
            return [] if is_no_picture(value) else listed(value)
        found: list[Any] = []
        by = ""
        for group in self.layout.images:
            some = [one for key in group if not is_no_picture(self.data[key]) for one in listed(self.data[key])]
            if not some:
                continue
            if not by:
                found, by = some, group[0]
            elif base_names(some) > base_names(found) and not any(map(is_address, some)):
                self.ignored.add(by)
                found, by = some, group[0]
            elif _are_others(some, found):
                raise UserError(
                    f"{self.where}: the keys {by} and {group[0]} name different pictures; columns: {{image: {by}}} "
                    f"reads the one, columns: {{image: [{by}, {group[0]}]}} both"
                )
            else:
                self.ignored.update(group)
        return found


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_others(some: list[Any], found: list[Any]) -> bool:
    """Whether these are other pictures than those that are read; names beside bytes tell where they came from."""
    if not all(isinstance(image, str) for image in found) or not all(isinstance(image, str) for image in some):
        return any(not isinstance(image, str) for image in some)
    return not all(map(is_address, some)) and not base_names(some) <= base_names(found)


def as_text(value: Any, key: str, where: str) -> str:
    """A text, number or boolean as text; UserError that says what was found of anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    raise UserError(f"{where}: {key} must be a text, not {kind_of(value)}")


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", str: "a text", bool: "a boolean"}
    shown = f": {str(value)[:60]!r}" if isinstance(value, (dict, list)) else ""
    return f"{names.get(type(value), f'a {type(value).__name__}')}{shown}"
