"""Files of rows: every line found once, with its number; broken files named."""

import json
import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.sources import Source, open_data, open_source
from data.streams import ColumnStream
from vlm import UserError

REAL = os.environ.get("VLM_DEV_DATA", "")
ROW = {"question": "what?", "answer": "a cube"}
BOM = b"\xef\xbb\xbf"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def line(answer: str) -> bytes:
    return json.dumps({"question": "what?", "answer": answer}, ensure_ascii=False).encode()


def answers(source: Source) -> list[str]:
    return [record.messages[-1]["content"][0]["text"] for record in source]


BLANKS = st.sampled_from([b"", b" ", b"\t \t"])
LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | BLANKS, min_size=1, max_size=12)


@given(lines=LINES, end=st.sampled_from([b"\n", b"\r\n"]), last=st.booleans(), bom=st.booleans())
@settings(max_examples=120, deadline=None)
def test_every_line_with_something_on_it_is_a_row_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str | bytes], end: bytes, last: bool, bom: bool
) -> None:
    content = [item if isinstance(item, bytes) else line(f"x{item}") for item in lines]
    expected = [(number, f"x{item}") for number, item in enumerate(lines, start=1) if not isinstance(item, bytes)]
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    data = (BOM if bom and content[0].strip() else b"") + end.join(content) + (end if last else b"")
    write(path, data)
    if not expected:
        with pytest.raises(UserError, match="no rows in it"):
            open_source(path)
        return
    source = open_source(path)
    assert len(source) == len(expected)
    assert answers(source) == [answer for _, answer in expected]
    assert [source.where(index) for index in range(len(source))] == [f"{path}:{number}" for number, _ in expected]
    again = pickle.loads(pickle.dumps(source))
    assert [*again] == [*source]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("head", [b"", BOM, b"\r\n \n"])
def test_a_json_array_is_rows_named_by_their_index(tmp_path: Path, head: bytes, indent: int | None) -> None:
    rows = [{**ROW, "answer": answer} for answer in ("one", "zwei", "ü")]
    source = open_source(write(tmp_path / "rows.json", head + json.dumps(rows, indent=indent).encode()))
    assert answers(source) == ["one", "zwei", "ü"]
    assert source.where(1) == f"{tmp_path / 'rows.json'}[1]"
    assert answers(pickle.loads(pickle.dumps(source))) == ["one", "zwei", "ü"]


BAD_FILES = {
    "empty": (b"", "no rows in it"),
    "blank": (b"\n \n" * 5000, "no rows in it"),
    "an empty array": (b"[]", "no rows in it"),
    "half an array": (b'[{"question": "what?"', "not valid JSON"),
    "an array and more": (b"[1]\n[2]\n", "not valid JSON"),
    "too deep an array": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_rows_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, complaint = BAD_FILES[kind]
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(UserError, match=complaint) as error:
        open_source(path)
    assert str(error.value).startswith(str(path))


BAD_LINES = {
    "half a row": b'{"question": "what?"',
    "two rows": line("a") + line("b"),
    "not UTF-8": b'{"question": "\xff", "answer": "a"}',
    "UTF-16": line("a").decode().encode("utf-16"),
    "too deep": b'{"a":' * 50_000,
    "words": b"question: what?",
    "a BOM alone": BOM,
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "rows.jsonl", b"\n".join([line("a"), b"", BAD_LINES[kind], line("b")]))
    source = open_source(path)
    with pytest.raises(UserError, match="not valid JSON") as error:
        source[1]
    assert str(error.value).startswith(f"{path}:3: ")
    assert answers_of(source, 0) == "a"
    assert answers_of(source, len(source) - 1) == "b"


def answers_of(source: Source, index: int) -> Any:
    return source[index].messages[-1]["content"][0]["text"]


def test_many_blank_lines_before_the_first_row_do_no_harm(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "rows.jsonl", b"\n" * 5000 + line("a")))
    assert (answers(source), source.where(0)) == (["a"], f"{tmp_path / 'rows.jsonl'}:5001")


def test_an_answer_may_be_a_megabyte(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "rows.jsonl", line("a") + b"\n" + line("b" * 1_000_000)))
    assert answers(source) == ["a", "b" * 1_000_000]


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: no such data file"):
        open_source(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no such data file"):
        open_source(tmp_path)
    path = write(tmp_path / "rows.jsonl", line("a"))
    with pytest.raises(UserError, match="elsewhere: no such image folder"):
        open_source(path, images=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "a.tar", "a.parquet", "folder"])
def test_a_pipe_is_refused_before_anybody_waits_for_it(tmp_path: Path, name: str) -> None:
    pipe = tmp_path / name
    if name == "folder":
        pipe = pipe / "a.tar"
        pipe.parent.mkdir()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"{pipe}: no plain file but a pipe"):
        open_source(tmp_path / name)
    with pytest.raises(UserError, match="/dev/null: no plain file"):
        open_source("/dev/null")


def test_braces_and_marks_in_names_of_what_is_there_are_no_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in ("{x,y}", "{0..9}/[a]", "x", "a"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("rows{1,2}.jsonl", "one-0.parquet", "one-1.parquet", "[1].parquet", "{a,b}.parquet"):
            path = tmp_path / folder / name
            if path.suffix == ".jsonl":
                write(path, line(folder))
            else:
                pq.write_table(pa.table({"question": ["?"], "answer": [f"{folder} {name}"]}), path)
    for folder in ("{x,y}", "{0..9}/[a]"):
        root = tmp_path / folder
        assert answers(open_source(root / "rows{1,2}.jsonl")) == [folder]
        expected = [f"{folder} one-{number}.parquet" for number in range(2)]
        for pattern in ("one-{0..1}.parquet", "one-*.parquet"):
            assert answers(open_source(root / pattern)) == expected
            stream = open_data(str(root / pattern), tmp_path, None, None, stream=True)
            assert isinstance(stream, ColumnStream)
            assert stream.files == [root / f"one-{number}.parquet" for number in range(2)]
        for name in ("[1].parquet", "{a,b}.parquet"):
            assert answers(open_source(root / name)) == [f"{folder} {name}"]
            stream = open_data(str(root / name), tmp_path, None, None, stream=True)
            assert [answers_of([item], 0) for item in stream.head(3)] == [f"{folder} {name}"]
    with pytest.raises(UserError, match=r"\{x,y\}/two-0\.parquet: no such data file"):
        open_source(tmp_path / "{x,y}" / "{one,two}-0.parquet")


def test_rows_out_of_range_are_none(tmp_path: Path) -> None:
    for name, content in (("rows.jsonl", line("a")), ("rows.json", b"[" + line("a") + b"]")):
        source = open_source(write(tmp_path / name, content))
        for index in (1, -1):
            with pytest.raises(IndexError):
                source[index]


@pytest.mark.parametrize("format", ["qa", None])
def test_rows_of_several_formats_are_told_and_may_be_refused(tmp_path: Path, format: str | None) -> None:
    rows = [ROW, {"messages": []}, {"caption": "x"}, {}, ROW]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    source = open_source(path, format=format)
    assert source.format == (format or "qa+messages+captions")
    with pytest.raises(
        UserError, match=f"rows.jsonl:2: {'a row of messages, where qa is read' if format else 'no mess'}"
    ):
        source[1]
    assert source[4].where == pickle.loads(pickle.dumps(source))[4].where
    with pytest.raises(UserError, match=r"rows\.jsonl: its rows are qa and messages and captions, not llava"):
        open_source(path, format="llava")
    assert open_source(write(path, b"{}")).format == "unknown"


def test_images_lie_where_one_says_or_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = write(tmp_path / "rows.jsonl", json.dumps({**ROW, "image": "a.png"}).encode())
    for folder, options in (
        (tmp_path, {}),
        (tmp_path / "images", {}),
        (tmp_path / "pictures", {"images": tmp_path / "pictures"}),
    ):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        assert open_source(path, **options)[0].images == ((folder / "a.png").resolve(),)


@pytest.mark.skipif(not REAL, reason="VLM_DEV_DATA names no folder with flickr8k")
def test_real_captions_and_questions_are_read_as_they_come() -> None:
    folder = Path(REAL) / "flickr8k"
    captions, questions = open_source(folder / "captions.jsonl"), open_source(folder / "yesno.jsonl")
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (len(captions), len(questions)) == (len(lines), 1504)
    for record, line in zip(islice(captions, 50), lines, strict=False):
        assert record.captions == tuple(line["captions"])
        assert record.images == ((folder / "images" / line["image"]).resolve(),)
    assert set(answers(questions)) == {"yes", "no"}
