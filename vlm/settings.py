"""Settings files: YAML plus `a.b=c` overrides, checked into frozen dataclasses. Typos are named."""

import difflib
import re
from collections.abc import Collection
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from vlm.arguments import fraction
from vlm.errors import UserError
from vlm.setting_errors import sentences

T = TypeVar("T")

# what a setting may be, checked by `parse`
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0)]


def _read_share(value: Any) -> Any:
    try:
        return fraction(value.strip()) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("a share such as 0.005 or 0.5% is needed") from None


_Fraction = BeforeValidator(_read_share)
Share = Annotated[float, _Fraction, Field(ge=0, le=1)]  # .005 or "0.5%"
BelowOne = Annotated[float, Field(ge=0, lt=1)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError with line and column when it can't be read."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a settings file is a mapping of names to values, not {type(loaded).__name__}")
    return loaded


def apply_overrides(settings: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Settings with each `a.b.0.c=value` applied; values are YAML, numbers in a path index lists."""
    settings = plain(settings)  # what a YAML file names twice (*alias) is one object until here, and would change twice
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"override {override!r}: write it as name.of.the.setting=value")
        node: Any = settings
        *parents, last = path.split(".")
        for depth, key in enumerate(parents):
            node = _child(node, key, ".".join(parents[:depth]), override, create=True)
        try:
            value = yaml.load(text, Loader=_Loader) if text else None
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"override {override!r}: {getattr(error, 'problem', None) or error}") from None
        if isinstance(node, list):
            node[_index(node, last, override)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise UserError(f"override {override!r}: {'.'.join(parents)} is a plain value and has no settings below it")
    return settings


def parse(kind: type[T], settings: Any, source: str) -> T:
    """`settings` as an instance of the dataclass `kind`; UserError naming the path of the first thing that is wrong."""
    try:
        adapter: TypeAdapter[T] = _adapter(cast(Any, kind))
        return adapter.validate_python(settings, extra="forbid")
    except ValidationError as error:
        found = sentences(error.errors())
        told = [_explain(kind, path, said) for path, said in found[:5]]
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"{source}: {'; '.join(told)}{more}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Building one takes a millisecond, and models parse parts of their configuration in every forward."""
    return TypeAdapter(kind)


def nearest(name: str, known: Collection[str]) -> str:
    """A hint for a name that isn't known: the one that was meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"


def dump(settings: Any) -> str:
    """A dataclass as YAML that `parse` reads back to an equal one."""
    return yaml.dump(plain(asdict(settings)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def find_config(name: str) -> Path:
    """A file of the configs that come with the toolkit, in a checkout or an installation."""
    home = Path(__file__).resolve().parent.parent
    found = next(
        (home / folder / name for folder in ("vlm_configs", "configs") if (home / folder / name).is_file()),
        None,
    )
    if found is None:
        raise UserError(f"no config {name!r} comes with this toolkit")
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text, since it lacks a dot; everybody means a number."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$"),
        list("-+0123456789."),
    )


def _child(node: Any, key: str, where: str, override: str, create: bool) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {where} is a plain value and has no settings below it")
    if node.get(key) is None and create:
        node[key] = {}
    return node[key]


def _index(items: list[Any], key: str, override: str) -> int:
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == key]
    if named:
        return named[0]
    if key.isdigit() and int(key) < len(items):
        return int(key)
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    raise UserError(
        f"override {override!r}: no entry {key!r}; there are {len(items)}{': ' * bool(names)}{', '.join(names)}"
    )


def _explain(kind: Any, path: list[Any], said: str) -> str:
    where = ".".join(str(part) for part in path) or "settings"
    return f"{where}: {said or f'unknown setting; {nearest(str(path[-1]), _keys_at(kind, path[:-1]))}'}"


def _keys_at(kind: Any, path: list[Any]) -> list[str]:
    """Names of the settings at `path` below the dataclass `kind`, looking through lists, tuples and unions."""
    for part in path:
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(str(part), object)
        elif isinstance(part, int):
            kind = get_args(kind)[0] if get_args(kind) else object
        if get_origin(kind) in (Union, UnionType):
            kind = next((arm for arm in get_args(kind) if is_dataclass(arm) or _holds_dataclass(arm)), kind)
    return sorted(field.name for field in fields(kind)) if is_dataclass(kind) else []


def _holds_dataclass(kind: Any) -> bool:
    return any(is_dataclass(arm) for arm in get_args(kind))


def plain(value: Any) -> Any:
    """Nested settings as what YAML and JSON know: dicts with text keys, lists, plain values."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
