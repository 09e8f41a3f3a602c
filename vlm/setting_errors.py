"""What is wrong with settings, in plain sentences: where, what is needed there, and what was found."""

import re
from collections.abc import Sequence
from typing import Any

_ARM = re.compile(r"(int|float|str|bool|none|dict|list|tuple|literal|Literal)(\[.*\])?")
_NEEDED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number with fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping {name: value}",
    "mapping_type": "a mapping {name: value}",
    "dataclass_type": "a mapping {name: value}",
    "dataclass_exact_type": "a mapping {name: value}",
    "finite_number": "a finite number",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
}


def sentences(details: Sequence[Any]) -> list[tuple[list[Any], str]]:
    """The errors of a validation: the path of each, and what is to be said of it; "" for a name that isn't known.

    Where a setting may be of several kinds, what fits the kind that was tried; else all kinds are named.
    """
    found: dict[tuple[Any, ...], list[Any]] = {}
    for detail in details:
        place = [part for part in detail["loc"] if not str(part).startswith(("function-", "tagged-"))]
        found.setdefault(tuple(part for part in place if not _is_arm(part)), []).append(detail)
    deeper = {
        path[:-1] for path, some in found.items() if path and any(_is_arm(part) for one in some for part in one["loc"])
    }
    return [(list(path), _said(some)) for path, some in found.items() if not (path in deeper and _has_arm(some))]


def _is_arm(part: Any) -> bool:
    return isinstance(part, str) and _ARM.fullmatch(part) is not None


def _has_arm(details: Sequence[Any]) -> bool:
    return all(_is_arm(detail["loc"][-1]) for detail in details if detail["loc"])


def _said(details: Sequence[Any]) -> str:
    first = details[0]
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return ""
    if first["type"] in ("missing", "missing_argument"):
        return "required, and missing"
    if first["type"] in ("value_error", "assertion_error"):
        return str(first["ctx"]["error"]) + _shown(first.get("input"))
    needed = list(dict.fromkeys(map(_needed, details)))
    return f"{' or '.join(needed)} is needed{_shown(first.get('input'), always=True)}"


def _needed(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return words.format(f"{context[name]:g}")
    if kind == "literal_error":
        return str(context["expected"])
    if kind in ("too_long", "too_short"):
        bound = f"at most {context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        return f"a list of {bound}"
    return _NEEDED.get(kind, "another value")


def _shown(value: Any, always: bool = False) -> str:
    """What was found; of lists and mappings, which may be long, the kind."""
    if isinstance(value, (dict, list, tuple)):
        kind = "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
        return f" (got {kind})" if always else ""
    return f" (got {value!r:.100})" if value is None or isinstance(value, (str, int, float, bool)) else ""
