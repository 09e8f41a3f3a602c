"""The same rows through every reader, converted and read again, by keys of other names, and packed."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.check import check_source
from data.check_figures import as_json
from data.convert import convert
from data.key_map import key_map, read_key_map
from data.pictures import read_bytes
from data.records import Record
from data.rows import Source
from data.sources import open_data, open_source
from data.streams import Stream
from tests.data.row_kinds import chat, qa
from vlm import UserError
from vlm.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(1, 4):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / "images" / f"{number}.jpg")
    return tmp_path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def meaning(record: Record) -> Any:
    return record.messages, [read_bytes(image) for image in record.images], record.captions, record.answers


def meanings(source: Source) -> list[Any]:
    return [meaning(record) for record in source]


ANSWER = {"role": "assistant", "content": "b"}
ROWS = [
    {"image_path": "1.jpg", "question": "q", "answer": 3, "id": 1},
    chat("<image>q<image>", images=["2.jpg", "1.jpg"], source="web"),
    {"images": ["1.jpg"], "texts": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}]},
    {"instruction": "i", "input": "q", "output": "a", "system": "s", "images": ["3.jpg"]},
    {"image": "1.jpg", "text": "q", "label": "no"},
    {"question": "q", "choices": ["x", "y"], "answer": 1, "image": "2.jpg"},
    {"messages": [*chat("q", "a")["messages"], {"role": "user", "content": "r"}, dict(ANSWER)]},
    {"question": "q", "answers": ["b", "a", "a"], "image_0": "1.jpg", "image_1": "3.jpg"},
    chat([{"type": "image", "index": 1}, {"type": "text", "text": "<image> q"}, {"type": "image", "index": 0}],
         images=["1.jpg", "2.jpg"]),
    {"image": "1.jpg", "captions": ["c", "d"], "system": "s"},
]  # fmt: skip
ROWS[6]["messages"][1]["weight"] = 0


@pytest.mark.parametrize("to", ["messages", "webdataset"])
def test_rows_of_any_kind_are_converted_to_rows_that_read_back_the_same(folder: Path, to: Any) -> None:
    source = open_source(lines(folder / "rows.jsonl", ROWS))
    expected = meanings(source)
    out = folder / ("new.jsonl" if to == "messages" else "shards")
    assert convert(source, out, to).bad == 0
    again = open_source(out, folder / "images" if to == "messages" else None)
    assert meanings(again) == expected
    assert meanings(open_source(lines(folder / "rows.jsonl", ROWS))) == expected
    if to == "messages":
        assert {key for row in again for key in row.ignored} == set()


def test_a_picture_in_a_row_of_text_stays_in_it(folder: Path) -> None:
    import base64

    text = base64.b64encode((folder / "images" / "1.jpg").read_bytes()).decode()
    source = open_source(lines(folder / "rows.jsonl", [qa(images=[f"data:image/jpeg;base64,{text}", "2.jpg"])]))
    assert convert(source, folder / "new.jsonl").good == 1
    assert meanings(open_source(folder / "new.jsonl")) == meanings(source)


def test_columns_and_tars_are_read_as_lines_are(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = [{"bytes": (folder / "images" / f"{number}.jpg").read_bytes(), "path": None} for number in (1, 2)]
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"image_0": held[0], "image_1": held[1], "question": "q", "answer": 1},
            qa(answer=1, images=["1.jpg", "2.jpg"]),
        ),
        (
            {"images": held, "texts": [{"user": "q", "assistant": "a"}], "source": "s"},
            chat("q", images=["1.jpg", "2.jpg"]),
        ),
        ({"images": held, **chat("<image>q<image>")}, chat("<image>q<image>", images=["1.jpg", "2.jpg"])),
        ({"image": held[1], "text": "q", "label": "yes"}, qa(answer="yes", image="2.jpg")),
    ]
    for number, (row, line) in enumerate(kinds):
        expected = meanings(open_source(lines(folder / "rows.jsonl", [line])))
        path = folder / f"{number}" / "rows.parquet"
        path.parent.mkdir()
        datasets.Dataset.from_list([row]).to_parquet(path)
        assert meanings(open_source(path)) == expected, row
        stream = open_data(str(path), folder, None, None, stream=True)
        assert isinstance(stream, Stream)
        (streamed,) = stream.head(1)
        assert isinstance(streamed, Record)
        assert meaning(streamed) == expected[0]
    members = {"1.json": chat("<image>q<image>"), "1.a.jpg": 1, "1.b.jpg": 2, "1.cls": {}}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in members.items():
            data = (
                (folder / "images" / f"{content}.jpg").read_bytes() if ".jpg" in name else json.dumps(content).encode()
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tarred = open_source(folder / "a.tar")
    assert meanings(tarred) == meanings(open_source(lines(folder / "rows.jsonl", [kinds[2][1]])))
    assert tarred[0].ignored == (".cls",)


def tar_of(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"1.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_files_of_a_sample_that_are_not_read_are_told_or_refused(folder: Path) -> None:
    picture = (folder / "images" / "1.jpg").read_bytes()
    row = json.dumps({"caption": "c", "image": "jpg"}).encode()
    source = open_source(tar_of(folder / "a.tar", json=row, jpg=picture, png=picture, txt=b"other", cls=b"7"))
    assert source[0].captions == ("c",)
    assert set(source[0].ignored) == {".png", ".txt", ".cls"}
    with pytest.raises(UserError, match=r"the key \.mp4 names '1\.mp4', which isn't read"):
        open_source(tar_of(folder / "b.tar", jpg=picture, txt=b"c", mp4=b"film"))[0]


def test_check_tells_rows_without_a_picture_and_columns_that_are_not_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *({**qa(question=str(number), image="1.jpg"), "id": number, "source": "s"} for number in range(4)),
        qa(id=9),
    ]
    path = lines(folder / "rows.jsonl", [*rows, qa(image="1.png"), qa(image="2.png"), qa(videos=["1.mp4"])])
    findings = check_source(open_source(path), workers=0)
    told = as_json(findings)
    assert (told["good"], told["text_only"], told["ignored"]) == (5, 1, {"id": 5, "source": 4})
    reason = "image '1.png' is not in images (there is '1.jpg')".replace("images", str(folder / "images"))
    (kind,) = [name for name, count in told["reasons"].items() if count == 2]
    assert told["examples"][kind] == {"where": f"{path}:6", "reason": reason}
    assert as_json(check_source(open_source(path), workers=2))["ignored"] == told["ignored"]
    assert main(["data", "check", str(path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "5 good of 8; 1 without an image" in out
    assert "ignored columns: id (5), source (4)" in out
    assert f"{path}:6: {reason} {path}:7" in out


def test_keys_of_other_names_are_read_by_the_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "pic": "1.jpg",
            "back": "2.jpg",
            "q": "q",
            "meta": {"gold": "a"},
            "answer": "no",
            "film": "x.mp4",
            "image": "3.jpg",
        }
    ]
    path = lines(folder / "rows.jsonl", [*rows, {"q": "q", "meta": {"gold": "a"}}])
    columns = key_map({"image": ["pic", "back"], "question": "q", "answer": "meta.gold", "ignore": "film"}, "columns")
    source = open_source(path, columns=columns)
    assert source.format == "qa"
    expected = meanings(open_source(lines(folder / "own.jsonl", [qa(images=["1.jpg", "2.jpg"]), qa()])))
    assert meanings(source) == expected
    assert set(source[0].ignored) == {"answer", "film", "image", "meta"}
    stream_columns = read_key_map(["image=pic+back", "question=q", "answer=meta.gold", "ignore=film"], "--columns")
    assert stream_columns == columns
    command = ["--columns", "image=pic", "image=back", "question=q", "answer=meta.gold", "ignore=film"]
    assert main(["data", "check", str(path), "--json", *command]) == 0
    assert json.loads(capsys.readouterr().out)["images"]["shown"] == 2
    assert main(["data", "convert", str(path), "--out", str(folder / "new.jsonl"), *command]) == 0
    assert meanings(open_source(folder / "new.jsonl")) == expected
    assert main(["data", "show", str(path), "0", *command]) == 0
    (folder / "rows.csv").write_text("picture;gold;ask\n1.jpg;a;q\n")
    table = open_source(
        folder / "rows.csv", columns=key_map({"image": "picture", "question": "ask", "answer": "gold"}, "c")
    )
    assert meanings(table) == meanings(open_source(lines(folder / "own.jsonl", [qa(image="1.jpg")])))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"imag": "pic"}, "nothing is read by the name 'imag'; did you mean 'image'"),
        ({"question": ["a", "b"]}, r"columns\.question: one key is read as question, not 2"),
        ({"question": ""}, r"columns\.question: needs the name of a key"),
        ({"question": "q", "answer": "q"}, "the key q is named twice"),
    ],
)
def test_a_map_that_can_not_work_is_refused(columns: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=f"^(columns: )?{complaint}"):
        key_map(columns, "columns")


def test_a_key_that_no_row_has_is_named_with_the_nearest(folder: Path) -> None:
    path = lines(folder / "rows.jsonl", [qa(picture_of="1.jpg")])
    with pytest.raises(UserError, match=r"no row has the key pictre_of; did you mean 'picture_of'"):
        open_source(path, columns=key_map({"image": "pictre_of"}, "columns"))
    (folder / "a.txt").write_text("1.jpg#0\ta cube\n")
    with pytest.raises(UserError, match="its own names; columns is for rows"):
        open_source(folder / "a.txt", columns=key_map({"image": "x"}, "columns"))


def test_packed_rows_are_read_from_the_cache_by_their_own_name(folder: Path) -> None:
    content = lines(folder / "rows.jsonl", [qa(image="1.jpg"), qa(image="none.jpg")]).read_bytes()
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    source = open_source(path)
    assert meaning(source[0]) == meaning(open_source(folder / "rows.jsonl")[0])
    with pytest.raises(UserError, match=rf"^{path}:2: image 'none\.jpg' is not in {folder}/images"):
        source[1]
    unpacked = [*(folder / "cache" / "unpacked").glob("*/*")]
    assert [file.read_bytes() for file in unpacked] == [content]
    before = unpacked[0].stat().st_mtime_ns
    open_source(path)
    assert unpacked[0].stat().st_mtime_ns == before
    path.write_bytes(gzip.compress(content * 2))
    os.utime(path, (1, 1))
    assert len(open_source(path)) == 4
    assert len([*(folder / "cache" / "unpacked").glob("*/*")]) == 1
    for name, text in (
        ("rows.csv.gz", "question,answer\nq,a\n"),
        ("rows.json.gz", '[{"question": "q", "answer": "a"}]'),
    ):
        (folder / name).write_bytes(gzip.compress(text.encode()))
        assert meanings(open_source(folder / name)) == meanings(open_source(lines(folder / "own.jsonl", [qa()])))


BROKEN = {
    "cut off": (gzip.compress(b'{"question": "q"}\n' * 99)[:-9], "it ends in the middle"),
    "not packed": (b'{"question": "q"}\n', "not a sound .gz"),
    "changed": (gzip.compress(b"x" * 999)[:-8] + bytes(8), "not a sound .gz"),
    "a bomb": (gzip.compress(bytes(80 << 20)), "comes to more than 64 MB, 200 times its size"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_packed_file_that_is_broken_or_a_bomb_is_refused_and_leaves_nothing(folder: Path, kind: str) -> None:
    content, complaint = BROKEN[kind]
    path = folder / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: .*{complaint}"):
        open_source(path)
    assert [*(folder / "cache").rglob("*.*")] == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"question,answer\rq,a\r", "its lines end in CR alone"),
        (b"ask,gold\nq,a\n", "two or more of them of .*; this one begins with 'ask, gold'"),
        (b"\n\n", "and this one is empty"),
    ],
)
def test_a_header_that_can_not_be_read_says_what_is_there(folder: Path, content: bytes, complaint: str) -> None:
    (folder / "rows.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.csv.*{complaint}"):
        open_source(folder / "rows.csv")


@pytest.mark.parametrize(
    "content",
    [
        b"Question,ANSWER,Image\nq,a,1.jpg\n",
        b"sep=;\nquestion;answer;image\nq;a;1.jpg\n",
        b'\xef\xbb\xbfsep=;\r\n"question";"answer";"image"\r\n"q";"a";"1.jpg"\r\n',
        b",question,answer,image\n0,q,a,1.jpg\n",
        b"\nquestion,answer,Image Path\nq,a,1.jpg\n",
        b"question|answer|image_path\nq|a|1.jpg\n",
    ],
)
def test_headers_as_spreadsheets_write_them(folder: Path, content: bytes) -> None:
    (folder / "rows.csv").write_bytes(content)
    source = open_source(folder / "rows.csv")
    assert meanings(source) == meanings(open_source(lines(folder / "own.jsonl", [qa(image="1.jpg")])))
    before = content.startswith(b"\n") or b"sep" in content
    assert source.where(0) == f"{folder}/rows.csv:{3 if before else 2}"


def test_a_format_says_what_rows_are_that_may_be_several(folder: Path) -> None:
    path = lines(folder / "rows.jsonl", [qa(image="1.jpg", caption="c")])
    assert open_source(path)[0].messages[-1]["content"][0]["text"] == "a"
    captions = open_source(path, format="captions")
    assert (captions.format, captions[0].captions, set(captions[0].ignored)) == (
        "captions",
        ("c",),
        {"question", "answer"},
    )
    with pytest.raises(UserError, match="its rows are qa, not llava"):
        open_source(path, format="llava")
    turns = lines(folder / "turns.jsonl", [ROWS[2]])
    assert open_source(turns, format="turns").format == open_source(turns).format == "turns"


def test_a_row_without_the_keys_of_the_map_is_told_with_its_own(folder: Path) -> None:
    columns = key_map({"question": "frage", "answer": "antwort"}, "columns")
    path = lines(
        folder / "rows.jsonl", [{"frage": "q", "antwort": "a"}, {"q": "q", "ans": "a"}, {"frage": "q", "x": 1}]
    )
    source = open_source(path, columns=columns)
    told = r"columns reads frage \(question\), antwort \(answer\), and it has nothing of that \(keys: q, ans\)"
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: unknown kind of row: {told}$"):
        source[1]
    with pytest.raises(UserError, match=r"rows\.jsonl:3: a question without an answer \(keys: frage, x\)"):
        source[2]
