"""Settings files: typos are named, numbers are numbers, and what is written reads back equal."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm import UserError
from vlm.settings import apply_overrides, dump, find_config, parse, plain, read_yaml


@dataclass(frozen=True)
class Inner:
    rate: float = 0.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int = 1
    inner: Inner = field(default_factory=Inner)
    kind: Literal["warm", "cold"] = "warm"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Run:
    stages: tuple[Stage, ...] = ()
    maybe: Inner | None = None
    title: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    layer: int | list[int] = -2
    flag: bool = False


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("given_settings", "complaint"),
    [
        ({"titel": "x"}, "titel: unknown setting; did you mean 'title'?"),
        ({"stages": [{"name": "a"}, {"name": "b", "stepz": 2}]}, "stages.1.stepz: unknown setting; did you mean 'step"),
        ({"stages": [{"name": "a", "inner": {"rat": 1}}]}, "stages.0.inner.rat: unknown setting; did you mean 'rate'?"),
        ({"maybe": {"nmaes": []}}, "maybe.nmaes: unknown setting; did you mean 'names'?"),
        ({"zzz": 1}, "zzz: unknown setting; known here: flag, free, layer, maybe, rates, stages, title"),
        ({"stages": [{}]}, "stages.0.name: required, and missing"),
        ({"stages": [{"name": "a", "steps": 0}]}, "stages.0: steps must be at least 1, got 0"),
        ({"stages": [{"name": "a", "steps": "many"}]}, "stages.0.steps: a whole number is needed (got 'many')"),
        ({"stages": [{"name": "a", "kind": "hot"}]}, "stages.0.kind: 'warm' or 'cold' is needed (got 'hot')"),
        ({"rates": {"x": "fast"}}, "rates.x: a number is needed (got 'fast')"),
        ([], "settings: "),
    ],
)
def test_a_mistake_is_named_by_its_path_and_the_nearest_key(given_settings: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        parse(Run, given_settings, "run.yaml")
    assert str(error.value).startswith("run.yaml: ")


def test_several_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError, match="titel") as error:
        parse(Run, {"titel": "x", "flga": True, "rates": {"x": "fast"}}, "run.yaml")
    assert all(name in str(error.value) for name in ("titel", "flga", "rates.x"))


FIRST, SECOND = Stage("first"), Stage("second", steps=2)
START = Run(stages=(FIRST, SECOND))


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["stages.1.steps=7"], {"stages": (FIRST, replace(SECOND, steps=7))}),
        (["stages.second.steps=7"], {"stages": (FIRST, replace(SECOND, steps=7))}),
        (["stages.first.inner.rate=1e-3"], {"stages": (replace(FIRST, inner=Inner(0.001)), SECOND)}),
        (["title=a=b"], {"title": "a=b"}),
        (["title='1e-3'"], {"title": "1e-3"}),
        (["flag=true", "flag=false"], {}),
        (["maybe.names=[a, b]", "maybe.rate=2"], {"maybe": Inner(2.0, ("a", "b"))}),
        (["free.deep.er=1"], {"free": {"deep": {"er": 1}}}),
        (["maybe="], {}),
        (["layer=[-2, -1]"], {"layer": [-2, -1]}),
    ],
)
def test_overrides_reach_into_mappings_and_into_lists_by_number_or_name(
    overrides: list[str], changes: dict[str, Any]
) -> None:
    start = {"stages": [{"name": "first"}, {"name": "second", "steps": 2}]}
    assert parse(Run, apply_overrides(start, overrides), "run") == replace(START, **changes)


def test_what_a_file_names_twice_is_changed_where_the_override_says(tmp_path: Path) -> None:
    """A YAML alias is one object in two places."""
    path = tmp_path / "r.yaml"
    path.write_text("a: {inner: &same {rate: 1}}\nb: {inner: *same}\n", encoding="utf-8")
    changed = apply_overrides(read_yaml(path), ["a.inner.rate=2"])
    assert changed == {"a": {"inner": {"rate": 2}}, "b": {"inner": {"rate": 1}}}


def test_a_list_entry_is_replaced_as_a_whole() -> None:
    assert apply_overrides({"stages": [{"name": "a"}, {"name": "b"}]}, ["stages.b={name: c}"])["stages"][1] == {
        "name": "c"
    }
    assert apply_overrides({"layer": [1, 2]}, ["layer.0=5"]) == {"layer": [5, 2]}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps", "write it as name.of.the.setting=value"),
        ("=3", "write it as name.of.the.setting=value"),
        ("stages.third.steps=1", "no entry 'third'; there are 2: first, second"),
        ("stages.2.steps=1", "no entry '2'; there are 2: first, second"),
        ("title.x=1", "title is a plain value and has no settings below it"),
        ("title.x.y=1", "title is a plain value and has no settings below it"),
        ("title=[1", "expected ',' or ']'"),
        ("title=2024-99-99", "month must be in 1..12"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(override: str, complaint: str) -> None:
    base = {"stages": [{"name": "first"}, {"name": "second"}], "title": "words"}
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        apply_overrides(base, [override])
    assert repr(override) in str(error.value)


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e-4", -2e-4), ("+1e2", 100.0), (".5", 0.5), ("1.", 1.0), ("1.5e3", 1500.0)],
)
def test_numbers_are_read_as_everybody_means_them(tmp_path: Path, written: str, number: float) -> None:
    read = read_yaml(write(tmp_path, f"rate: {written}\n"))["rate"]
    assert isinstance(read, float)
    assert read == number
    assert apply_overrides({}, [f"rate={written}"]) == {"rate": number}


def test_what_is_no_number_stays_text(tmp_path: Path) -> None:
    words = {"a": "1e", "b": "e5", "c": "1e5x", "d": "1e-3 m", "e": "v1.5", "f": "1.2.3"}
    assert read_yaml(write(tmp_path, "".join(f"{key}: {word}\n" for key, word in words.items()))) == words
    assert read_yaml(write(tmp_path, "n: 3\nm: -7\n")) == {"n": 3, "m": -7}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ":3:2: not valid YAML"),
        ("a: 1\n\tb: 2\n", ":2:1: not valid YAML"),
        ("a: 'open\n", ":2:1: not valid YAML"),
        ("- 1\n- 2\n", ": a settings file is a mapping of names to values, not list"),
        ("", ": a settings file is a mapping of names to values, not NoneType"),
        ("just words", "not str"),
        ("a: 2024-99-99\n", "not valid YAML (month must be in 1..12)"),
        ("a: !!python/object/apply:os.getcwd []\n", ":1:4: not valid YAML"),
    ],
)
def test_a_file_that_is_no_settings_file_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        read_yaml(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    for path, complaint in (
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.yaml", "cannot be read"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            read_yaml(path)
        assert str(error.value).startswith(str(path))


# YAML has no way to write these line ends inside a text that PyYAML reads back
WORDS = st.text(max_size=12).filter(lambda word: not set(word) & set("\x85\u2028\u2029"))
TRICKY = st.sampled_from(
    ["1e5", "1e-3", "12", "1.5", ".5", "0x1F", "1:30", "yes", "null", "~", "", "- a", "a: b", "#", "2024-01-01", "<<"]
)
NUMBERS = st.floats(allow_nan=False) | st.integers(-(10**9), 10**9).map(float)
INNERS = st.builds(Inner, rate=NUMBERS, names=st.lists(WORDS | TRICKY, max_size=3).map(tuple))
STAGES = st.builds(Stage, WORDS | TRICKY, st.integers(1, 10**9), INNERS, st.sampled_from(["warm", "cold"]))
FREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | TRICKY, inner, max_size=3),
    max_leaves=8,
)
RUNS = st.builds(
    Run,
    stages=st.lists(STAGES, max_size=3).map(tuple),
    maybe=st.none() | INNERS,
    title=WORDS | TRICKY,
    rates=st.dictionaries(WORDS | TRICKY, NUMBERS, max_size=3),
    free=st.dictionaries(WORDS | TRICKY, FREE, max_size=3),
    layer=st.integers(-9, 9) | st.lists(st.integers(-9, 9), max_size=3),
    flag=st.booleans(),
)


@given(run=RUNS)
@settings(max_examples=120, deadline=None)
def test_dumped_settings_read_back_equal(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(run), encoding="utf-8")
    assert parse(Run, read_yaml(path), "run") == run
    assert yaml.safe_load(dump(run)) is not None  # any other reader of YAML can open it, too


def test_paths_and_tuples_are_written_plainly() -> None:
    assert plain({1: (Path("a/b"), [None, 2.5])}) == {"1": ["a/b", [None, 2.5]]}


def test_a_config_that_does_not_come_with_the_toolkit_is_named() -> None:
    with pytest.raises(UserError, match=r"'nonesuch\.yaml'"):
        find_config("nonesuch.yaml")
