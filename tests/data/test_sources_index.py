"""Where rows begin in files of any size: found through a window, kept on disk for big files."""

import io
import json
import os
import pickle
import pwd
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import index, lines, scanner
from data.scanner import Scanner
from data.sources import Source, open_source
from vlm import UserError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def line(answer: str) -> bytes:
    return json.dumps({"question": "what?", "answer": answer}).encode()


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "_WINDOW", 24)
    monkeypatch.setattr(lines, "_CHUNK", 7)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(rows=st.lists(VALUES, min_size=1, max_size=8), indent=st.sampled_from([None, 0, 3]), plain=st.booleans())
@settings(max_examples=300, deadline=None)
def test_elements_are_found_whatever_the_window(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, plain: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=plain).encode(errors="surrogatepass")
    path = tmp_path_factory.getbasetemp() / "rows.json"
    before = scanner._WINDOW
    for window in (17, 18, 19, 40, 1 << 20):
        scanner._WINDOW = window
        try:
            starts, broken = lines.element_starts(Scanner(io.BytesIO(text), path))
        finally:
            scanner._WINDOW = before
        found = [lines.strip_comma(text[a:b]) for a, b in pairwise(starts)]
        assert broken is None
        assert [json.loads(row.decode(errors="surrogatepass")) for row in found] == rows


@pytest.mark.usefixtures("small_windows")
def test_objects_are_walked_through_in_any_window() -> None:
    value = {"a": [1, {"b": "x" * 100}], "c": {"d": [[]]}, "long" * 20: 12345678901234567890, "e": -1.5e300}
    text = json.dumps(value, indent=2).encode()
    walker = Scanner(io.BytesIO(text), Path("x"))
    found = {key: text[slice(*walker.value()[:2])] for key in walker.members()}
    walker.end()
    assert {key: json.loads(part) for key, part in found.items()} == value


BROKEN = {
    "a comma too many": (b'[{"a": 1},\n{"a": 2},,\n{"a": 3}]', 2, "Expecting value, line 2"),
    "no comma": (b'[{"a": 1}\n{"a": 2}]', 1, r"',' or ']' is due, line 2"),
    "a comma at the end": (b'[{"a": 1},\n]', 1, "Expecting value, line 2"),
    "a broken row": (b'[{"a": 1},\n\n{"a": nope},\n{"a": 3}]', 1, "Expecting value, line 3"),
    "a line end in a text": (b'[{"a": 1},\n{"a": "\n"}]', 1, "Invalid control character at, line 2"),
    "a NUL": (b'[{"a": 1},\n\0{"a": ""}]', 1, "Expecting value, line 2"),
    "cut off in a text": (b'[{"a": 1},\n{"a": "abc', 1, "the file ends in the middle; was it cut off"),
    "cut off in a row": (b'[{"a": 1},\n{"a": ', 1, "the file ends in the middle; was it cut off"),
    "cut off between": (b'[{"a": 1},\n{"a": 2}\n', 2, "the file ends in the middle; was it cut off"),
    "a bomb": (b'[{"a": 1},' + b"[" * 200_000, 1, "nested too deeply, line 1"),
    "more behind it": (b'[{"a": 1}]\n[{"a": 2}]', 1, "more behind its end, line 2"),
}


@pytest.mark.parametrize("windows", ["small", "large"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_array_is_named_with_the_row_and_the_line(
    tmp_path: Path, kind: str, windows: str, request: pytest.FixtureRequest
) -> None:
    if windows == "small":
        request.getfixturevalue("small_windows")
    content, row, complaint = BROKEN[kind]
    path = write(tmp_path / "rows.json", content)
    place = rf"^{path}\[{row}\]: not valid JSON \({complaint}.*"
    with pytest.raises(UserError, match=rf"{place}; `vlm data convert` saves the rows before it"):
        open_source(path)
    source = open_source(path, whole=False)
    assert [source.row(index) for index in range(len(source) - 1)] == [{"a": 1}, {"a": 2}][:row]
    for opened in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(UserError, match=f"{place}; what lies behind isn't read"):
            opened[row]


def test_rows_before_a_break_are_kept_in_the_index_with_it(tmp_path: Path, kept: Path) -> None:
    path = write(tmp_path / "rows.json", b"[" + line("a") + b"," + line("b")[:-3])
    first = open_source(path, whole=False)
    assert len([*kept.glob("*.npz")]) == 1
    again = open_source(path, whole=False)
    assert (len(again), again.cut, again[0]) == (2, first.cut, first[0])
    assert "was it cut off?" in again.cut


def test_a_row_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr("data.rows.MOST_BYTES", 1 << 20)
    monkeypatch.setattr(scanner, "_WINDOW", 1 << 16)
    rows = [line("a"), line("b" * (2 << 20)), line("c")]
    with pytest.raises(UserError, match=r"rows\.json\[1\]: a value of more than 1 MB, line 2"):
        open_source(write(tmp_path / "rows.json", b"[" + b",\n".join(rows) + b"]"))
    source = open_source(write(tmp_path / "rows.jsonl", b"\n".join(rows)))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a row of 2 MB, and 1 MB are the most"):
        source[1]
    assert source[2].messages[-1]["content"][0]["text"] == "c"


def test_numbers_that_are_too_long_are_one_broken_row(tmp_path: Path) -> None:
    rows = [line("a"), b'{"question": "q", "answer": "a", "n": ' + b"9" * 5000 + b"}", line("c")]
    for name, content in (("a.json", b"[" + b",".join(rows) + b"]"), ("a.jsonl", b"\n".join(rows))):
        source = open_source(write(tmp_path / name, content))
        with pytest.raises(UserError, match="a number too long"):
            source[1]
        assert source[2].where == source.where(2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_other_encodings_are_named_or_every_line_is_broken(tmp_path: Path, encoding: str, name: str) -> None:
    text = line("a").decode() + "\n"
    path = write(tmp_path / name, (f"[{text}]" if name == "rows.json" else text).encode(encoding))
    with pytest.raises(UserError, match=r"UTF-16, where UTF-8 is needed|not valid JSON"):
        open_source(path)[0]


def test_an_object_over_several_lines_is_no_file_of_rows(tmp_path: Path) -> None:
    row = json.dumps({"messages": []}, indent=1).encode()
    with pytest.raises(UserError, match=r"one JSON object over several lines; rows are one a line, or elements"):
        open_source(write(tmp_path / "row.json", row))
    assert open_source(write(tmp_path / "rows.json", line("a") + b"\n{\n")).format == "qa"


BLANKS = st.sampled_from([b"", b" ", b"\t \x0b", b"\r", b"x", b"\xef\xbb\xbf", b"  x  " * 3])


@given(pieces=st.lists(BLANKS, max_size=12), last=st.booleans(), chunk=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_lines_are_found_whatever_the_chunk(pieces: list[bytes], last: bool, chunk: int) -> None:
    content = b"\n".join(pieces) + (b"\n" if last else b"")
    expected, offset = [], 0
    for number, piece in enumerate(content.split(b"\n"), start=1):
        if piece.strip():
            expected.append((number, offset))
        offset += len(piece) + 1
    before, lines._CHUNK = lines._CHUNK, chunk
    try:
        found = lines.index_lines(io.BytesIO(content), lambda done: None)
    finally:
        lines._CHUNK = before
    numbers = found["numbers"].tolist() or list(range(1, len(found["starts"])))
    assert [*zip(numbers, found["starts"].tolist(), strict=False)] == expected
    assert found["starts"][-1] == len(content)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes of all files are kept, here."""
    monkeypatch.setattr(index, "KEEP_FROM", 1)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of which an index is built from now on."""
    names: list[Path] = []
    build = index._build

    def tell(path: Path, *rest: Any) -> Any:
        names.append(path)
        return build(path, *rest)

    monkeypatch.setattr(index, "_build", tell)
    return names


def texts(source: Source) -> list[str]:
    return [record.messages[-1]["content"][0]["text"] for record in source]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_the_index_of_a_big_file_is_built_once(
    tmp_path: Path, kept: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [line("a"), line("b")]
    content = {"rows.json": b"[" + b",".join(rows) + b"]", "rows.jsonl": b"\n\n".join(rows)}[name]
    path = write(tmp_path / name, content)
    names = built(monkeypatch)
    for _ in range(3):
        source = open_source(path)
        assert (texts(source), source.where(1)[-3:]) == (["a", "b"], "[1]" if name == "rows.json" else "l:3")
    assert texts(pickle.loads(pickle.dumps(source))) == ["a", "b"]
    assert names == [path]
    assert [file.suffix for file in kept.iterdir()] == [".npz"]


def test_an_index_is_built_anew_when_the_file_or_the_index_changed(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", line("a") + b"\n" + line("b"))
    names = built(monkeypatch)
    assert texts(open_source(path)) == ["a", "b"]
    write(path, line("aa") + b"\n" + line(""))  # as long as before
    os.utime(path, ns=(1, 1))
    assert open_source(path).row(0)["answer"] == "aa"
    (slot,) = kept.iterdir()
    whole = slot.read_bytes()
    for damage in (b"", b"PK", whole[: len(whole) // 2], whole[:-100] + bytes(100), b"\x80\x04N."):
        slot.write_bytes(damage)
        assert len(open_source(path)) == 2
        assert slot.read_bytes() == whole
    count = len(names)
    middle = bytearray(whole)
    middle[whole.index(b"starts.npy") + 170] ^= 1
    slot.write_bytes(middle)
    assert len(open_source(path)) == 2
    assert len(names) == count + 1


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(kept.parent, b"a file, where a folder is needed")
    path = write(tmp_path / "rows.jsonl", line("a"))
    assert texts(open_source(path)) == ["a"]
    assert "the index isn't kept" in capsys.readouterr().err


def test_a_fingerprint_is_of_the_data_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_WHOLE", 1 << 12)
    for name, rows in (("small.jsonl", 3), ("big.jsonl", 3000)):
        content = b"\n".join(line(f"{number:05}") for number in range(rows))
        path = write(tmp_path / name, content)
        told = open_source(path).fingerprint()
        os.utime(path, (1, 1))
        (tmp_path / "copies").mkdir(exist_ok=True)
        copy = write(tmp_path / "copies" / name, content)
        assert open_source(path).fingerprint() == open_source(copy).fingerprint() == told
        changed = [content.replace(b"00000", b"00009", 1), content + b"\n", content[:-3] + b'X"}']
        if rows == 3:
            changed.append(content.replace(b"00001", b"00009"))
        else:
            changed.append(b"\n".join(reversed(content.split(b"\n"))))
        told_of_others = {open_source(write(copy, other)).fingerprint() for other in changed}
        assert len(told_of_others | {told}) == 5


def test_a_fingerprint_of_many_files_goes_by_names_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / f"{number}.bin", bytes(number)) for number in range(20)]
    told = index.fingerprint(files)
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("a file was opened"))
    assert index.fingerprint(files) == told
    monkeypatch.undo()
    write(files[7], bytes(8))
    assert index.fingerprint(files) != told
    assert index.fingerprint([], "a", "b") != index.fingerprint([], "ab")
    with pytest.raises(UserError, match=r"gone: cannot be read \(No such file"):
        index.fingerprint([tmp_path / "gone"])


def test_without_a_home_the_place_for_indexes_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", line("a"))
    for name in ("HOME", "VLM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", dict[int, Any]().__getitem__)  # as for a number that is nobody's
    assert len(open_source(path)) == 1  # whose index isn't kept
    monkeypatch.setattr(index, "KEEP_FROM", 1)
    with pytest.raises(UserError, match="no home folder to keep indexes in; name a folder for them in VLM_CACHE"):
        open_source(path)


KILLED = """
import sys
from data import index
index.KEEP_FROM = 1
save = index.np.savez
def half(file, **arrays):
    save(file, **arrays)
    file.flush()
    import os
    os._exit(9)
index.np.savez = half
from data.sources import open_source
open_source(sys.argv[1])
"""


def test_a_process_killed_while_it_writes_the_index_does_no_harm(tmp_path: Path, kept: Path) -> None:
    path = write(tmp_path / "rows.jsonl", line("a"))
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env={**os.environ, "VLM_CACHE": str(kept.parent)})
    assert done.returncode == 9
    assert not [*kept.glob("*.npz")]
    assert texts(open_source(path)) == ["a"]
    assert len([*kept.glob("*.npz")]) == 1


def test_a_file_that_is_cut_while_it_is_open_gives_errors_not_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"\n".join(line(str(n)) for n in range(1000)))
    source = open_source(path)
    os.truncate(path, 100)
    with pytest.raises(UserError, match=r"rows\.jsonl:900: not there any more; was the file changed"):
        source[899]


def test_memory_stays_flat_from_the_first_row_to_the_last(tmp_path: Path) -> None:
    pool = [line("b" * random.Random(n).randint(100, 2000)) for n in range(500)]
    path = write(tmp_path / "rows.json", b"[" + b",\n".join(pool * 80) + b"]")
    code = (
        "import sys\nfrom data.sources import open_source\n"
        "def rss():\n    return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "before = rss()\nsource = open_source(sys.argv[1])\n"
        "for index in range(len(source)): source[index]\n"
        "print(len(source), rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 40_000
    assert grown < 16 < path.stat().st_size >> 21


def test_ids_are_equal_where_they_are() -> None:
    from data.rows import key_of, keys_of

    names = [1, "1", "01", 10**17, 10**30, str(10**30), "a", "ü", None, -5, "-5", 0]
    keys = keys_of(names)
    assert keys.dtype == np.int64
    assert [a == b for a, b in pairwise(keys)] == [str(a) == str(b) for a, b in pairwise(names)]
    assert len(set(keys.tolist())) == len(set(map(str, names)))
    assert key_of("00") != key_of("0")
