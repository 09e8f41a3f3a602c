"""CSV and TSV files, as spreadsheets and scripts write them."""

import csv
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.bad import Bad
from data.records import Record
from data.sources import open_source
from data.streams import spread
from vlm import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1, max_size=12)


def answer(record: Record) -> str:
    return str(record.messages[-1]["content"][0]["text"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    return tmp_path


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
@settings(max_examples=100, deadline=None)
def test_what_the_csv_module_writes_is_read_with_the_line_it_begins_on(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], quoting: int
) -> None:
    rows = [(question, f"x{text}") for question, text in rows]
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    lines = []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator="\n")
        writer.writerow(["question", "answer"])
        for row in rows:
            file.flush()
            lines.append(path.read_bytes().count(b"\n") + 1)
            writer.writerow(row)
    source = open_source(path)
    assert [(record.messages[0]["content"][0]["text"], answer(record)) for record in source] == rows
    assert [source.where(index) for index in range(len(source))] == [f"{path}:{line}" for line in lines]
    assert source.format == "qa"


HEADS = {
    "captions.csv": ("image,caption\n", 'a.jpg,"a cat, ""the"" cat"\n', "captions", 'a cat, "the" cat'),
    "captions.tsv": ("image\tcaption\n", "a.jpg\ta cat, a dog\n", "captions", "a cat, a dog"),
    "list.csv": ('"image","captions"\r\n', 'a.jpg,"[""one"", ""two""]"\r\n', "captions", "one"),
    "one.csv": ("captions;image\n", "[one;a.jpg\n", None, "captions begins like a JSON list, but is none"),
    "folder.csv": ("file_name,text\n", "a.jpg,a cat\n", "captions", "a cat"),
    "bom.csv": ("\ufeffid,image,question,answer\n", "1,a.jpg,what?,this\n", "qa", "this"),
    "several.csv": ("image,question,answers\n", 'a.jpg,what?,"[""a"", ""b"", ""b""]"\n', "qa", "b"),
    "text only.csv": ("image,question,answer\n", ",what?,this\n", "qa", "this"),
    "spaces.csv": ("image , question, answer\n", "a.jpg,what?,this\n", "qa", "this"),
}


@pytest.mark.parametrize("name", HEADS)
def test_columns_are_the_keys_of_a_row(folder: Path, name: str) -> None:
    head, row, format, text = HEADS[name]
    path = folder / name
    path.write_bytes((head + row).encode())
    source = open_source(path)
    if format is None:
        with pytest.raises(UserError, match=rf"{name}:2: {text}"):
            source[0]
        return
    assert (source.format, len(source), answer(source[0])) == (format, 1, text)
    assert source[0].images == (() if name == "text only.csv" else ((folder / "a.jpg").resolve(),))
    assert source.where(0) == f"{path}:2"
    assert answer(pickle.loads(pickle.dumps(source))[0]) == text


BROKEN = {
    "too few": (b"x\n", 1, "1 values, where the header names 2 columns"),
    "too many": (b"a,b,c\n", 1, "3 values, where the header names 2 columns"),
    "half a quote": (b'"a"b,c\n', 1, "not a row of a table"),
    "not UTF-8": (b"\xff,c\n", 1, "byte 1 of the row is no UTF-8"),
    "a bare CR": (b"a\rb,c\n", 1, "a line break .* inside of a value"),
    "an open quote": (b'"a,b\nq,a\n', 1, "not a row of a table"),
    "an empty answer": (b"q,\n", 1, "an empty answer"),
    "a NUL": (b"q,a\0\n", None, ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_named_and_the_others_are_read(folder: Path, kind: str) -> None:
    content, bad, complaint = BROKEN[kind]
    path = folder / "rows.csv"
    path.write_bytes(b"question,answer\n\nwhat?,first\n\n" + content + b"what?,last\n")
    source = open_source(path)
    assert answer(source[0]) == "first"
    assert source.where(0) == f"{path}:3"
    if bad is None:
        assert [*source]
        return
    with pytest.raises(UserError, match=rf"^.*rows\.csv:5: .*{complaint}"):
        source[bad]
    assert answer(source[len(source) - 1]) == "last"


OPEN = {
    "to the end": (b'"a,b\n', b"", [5]),
    "at the end of a row": (b'a,"b\n', b"", [5]),
    "in the last row": (b"", b'"a,b', [306]),
    "up to another open one": (b'"a,b\n', b'q,"open\n', [5, 307]),
    "up to a quoted value": (b'"a,b\n', b'"who, me?","yes\nyou"\n', [5]),
    "up to a quote at the end of a value": (b'"a,b\n', b'5",b,c\n', [5, 307]),
    "two one behind the other": (b'"a,b\n"c,d\n', b"", [5, 6]),
}


@pytest.mark.parametrize("kind", OPEN)
def test_an_open_quote_takes_in_no_row_behind_it(folder: Path, kind: str) -> None:
    before, behind, broken = OPEN[kind]
    path = folder / "rows.csv"
    rows = b"".join(b"what?,%d\n" % number for number in range(300))
    path.write_bytes(b'question,answer\n\n"one\n""line""",first\n' + before + b"\n" + rows + behind)
    source = open_source(path)
    items = list(spread(source, len(source)))
    bad = [int(item.where.rpartition(":")[2]) for item in items if isinstance(item, Bad)]
    found = [answer(item) for item in items if isinstance(item, Record)]
    assert found == ["first", *map(str, range(300)), *(["yes\nyou"] if b"yes" in behind else [])]
    assert bad == broken
    if b"5" not in behind:
        with pytest.raises(UserError, match="is a quote left open"):
            source[found.index("0") if before else len(source) - 1]


def test_open_quotes_cost_no_more_than_rows(folder: Path) -> None:
    path = folder / "rows.csv"
    path.write_bytes(b"question,answer\n" + b'"a,b\nwhat?,yes\n' * 50_000)
    source = open_source(path)
    assert len(source) == 100_000
    assert answer(source[99_999]) == "yes"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "begins with the names of its columns"),
        (b"a.jpg,a cat\n", "begins with the names of its columns"),
        (b"image,caption\n", "no rows in it"),
        (b"image,caption,image\na,b,c\n", "names image twice"),
        ("image,caption\n".encode("utf-16"), "the header isn't UTF-8"),
    ],
)
def test_a_table_without_header_or_rows_is_refused(folder: Path, content: bytes, complaint: str) -> None:
    path = folder / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}.*{complaint}"):
        open_source(path)


def test_a_value_may_be_a_megabyte(folder: Path) -> None:
    path = folder / "rows.csv"
    path.write_text("question,answer\nwhat?," + "b" * 1_000_000 + "\n")
    assert len(answer(open_source(path)[0])) == 1_000_000
