"""What is written reads back to the same records; what is broken is put aside; what is killed goes on."""

import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.convert import Converted, Job, convert
from data.pictures import read_bytes
from data.records import Record
from data.sources import Source, open_source
from vlm import UserError
from vlm.cli import main

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "captions": ["a cube", "one cübe"], "prompt": "say it"},
    {"image": "sub/b.jpg", "caption": "x" * 3000},
    {"question": "what <image>?", "answer": "1\n2"},
    {"question": "which?", "images": ["a.png", "sub/b.jpg"], "answers": ["c", "d", "d"]},
    {
        "image": ["a.png", "a.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "this <image>\nand\n<image>?"},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": ""},
            {"from": "gpt", "value": "no"},
        ],
    },
    {"texts": ["first", None, "then"], "images": [None, "a.png", None]},
]
BAD: list[dict[str, Any]] = [
    {"image": "none.png", "caption": "x"},
    {"question": "q", "answer": ""},
    {"image": "text.png", "caption": "no image"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (4, 3), (9, 8, 7)).save(root / "images" / "a.png")
    Image.new("RGB", (6, 5), (9, 8, 7)).save(root / "images" / "sub" / "b.jpg")
    (root / "images" / "text.png").write_text("no image")
    return root


def rows_file(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def meaning(record: Record) -> tuple[Any, ...]:
    """A record without the places where its parts lie."""
    return record.messages, tuple(map(read_bytes, record.images)), record.captions, record.kind


def meanings(source: Source) -> list[tuple[Any, ...]]:
    return [meaning(record) for record in source]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_jsonl_and_shards_read_back_to_the_same_records(folder: Path, tmp_path: Path, size: int, workers: int) -> None:
    if workers == 2 and size != 4:
        pytest.skip("one size in two processes is enough")
    source = open_source(rows_file(folder, ROWS))
    expected = meanings(source)
    out = tmp_path / "out.jsonl"
    assert convert(source, out, size=size, workers=workers) == Converted(6, 0, tmp_path / "out.quarantine.jsonl")
    again = open_source(out, folder / "images")
    assert [record.images for record in again] == [record.images for record in source]
    assert meanings(again) == expected
    convert(source, tmp_path / "shards", "webdataset", size=size, workers=workers)
    shards = open_source(tmp_path / "shards")
    assert meanings(shards) == expected
    (tmp_path / "back").mkdir()
    convert(shards, tmp_path / "back" / "rows.jsonl")
    assert meanings(open_source(tmp_path / "back" / "rows.jsonl")) == expected
    assert len([*(tmp_path / "back" / "images").rglob("*.*")]) == 2  # each image once
    assert not [*tmp_path.rglob("*.new"), *tmp_path.rglob("*.parts"), *tmp_path.rglob("*quarantine*")]


def test_rows_are_canonical(folder: Path, tmp_path: Path) -> None:
    source = open_source(rows_file(folder, ROWS[:2]))
    convert(source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    user = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "say it"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cube"}]}
    assert rows[0] == {"messages": [user, answer], "captions": ["a cube", "one cübe"]}
    assert open_source(tmp_path / "out.jsonl", folder / "images").format == "messages"
    assert rows[1]["messages"][0]["content"][0] == {"type": "image", "image": "sub/b.jpg"}


@pytest.mark.parametrize("to", ["messages", "webdataset"])
def test_broken_rows_are_put_aside_with_where_and_why(folder: Path, tmp_path: Path, to: Any) -> None:
    rows = [ROWS[0], BAD[0], "no JSON", ROWS[2], BAD[1], BAD[2]]
    path = rows_file(folder, rows)
    source = open_source(path)
    out = tmp_path / ("out.jsonl" if to == "messages" else "out")
    done = convert(source, out, to, size=2)
    aside = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    lines = [2, 3, 5] if to == "messages" else [2, 3, 5, 6]  # the bytes of a picture are looked at when it's copied
    assert [row["where"] for row in aside] == [f"{path}:{line}" for line in lines]
    assert [row["reason"].split(" (")[0] for row in aside[:3]] == [
        f"image 'none.png' is not in {folder / 'images'}",
        "not valid JSON",
        "message 2: an empty answer",
    ]
    assert (done.good, done.bad) == (6 - len(lines), len(lines))
    assert len(open_source(out, folder / "images")) == done.good
    assert done.good + done.bad == len(source)


def stopped_at(number: int) -> Callable[..., int]:
    write = Job.write_part

    def stop(job: Job, part: int) -> int:
        if part == number:
            raise KeyboardInterrupt
        return write(job, part)

    return stop


@pytest.mark.parametrize("to", ["messages", "webdataset"])
def test_what_was_stopped_goes_on_where_it_was(
    folder: Path, tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, BAD[0]]
    out, whole = (tmp_path / f"{name}{'.jsonl' if to == 'messages' else ''}" for name in ("out", "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Job, "write_part", stopped_at(2))
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(rows_file(folder, rows)), out, to, size=2)
    assert not out.is_file()
    written: list[int] = []
    write = Job.write_part
    monkeypatch.setattr(Job, "write_part", lambda job, part: (written.append(part), write(job, part)))
    done = convert(open_source(folder / "rows.jsonl"), out, to, size=2)
    assert (written, done.good, done.bad) == ([2, 3], 6, 1)
    assert "2 of 4 parts are there from before" in capsys.readouterr().err
    convert(open_source(folder / "rows.jsonl"), whole, to, size=2)
    files = [file.relative_to(whole) for file in whole.rglob("*")] if to == "webdataset" else [Path()]
    assert [(out / file).read_bytes() for file in files] == [(whole / file).read_bytes() for file in files]


@pytest.mark.parametrize("to", ["messages", "webdataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_said_in_a_sentence_and_what_is_finished_is_kept(
    folder: Path, tmp_path: Path, to: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "?", "answer": str(number)} for number in range(12_000)]
    rows.append({"question": "?", "answer": "long" * 1_000_000})
    out = tmp_path / ("out.jsonl" if to == "messages" else "out")
    arguments = ["data", "convert", str(rows_file(folder, rows)), "--to", to, "--out", str(out)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))  # as a disk that takes no more
    try:
        assert main([*arguments, "--workers", str(workers)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err.splitlines(keepends=True)[-1]  # before it progress, where it took long
    assert told == (
        f"vlm data: {out}: cannot be written (File too large); the same command goes on with what is finished\n"
    )
    assert not [*tmp_path.rglob("*.new")]
    assert main([*arguments, "--workers", "0"]) == 0
    assert f"{2 if to == 'messages' else 12} of {3 if to == 'messages' else 13} parts are there" in (
        capsys.readouterr().err
    )
    assert len(open_source(out)) == len(rows)


def test_a_name_that_is_too_long_is_said_in_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, long = rows_file(folder, ROWS), tmp_path / f"{'x' * 300}.jsonl"
    for source, out in ((path, long), (long, tmp_path / "out.jsonl"), (path, tmp_path / f"{'x' * 245}.jsonl")):
        assert main(["data", "convert", str(source), "--out", str(out)]) == 1
        wrong = source if source == long else out
        told = capsys.readouterr().err
        assert told.startswith(f"vlm data: {wrong}: cannot be ")
        assert "(File name too long)" in told
        assert "--debug" not in told


def test_parts_of_another_source_are_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Job, "write_part", stopped_at(1))
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(rows_file(folder, ROWS)), tmp_path / "out", "webdataset", size=2)
    rows = [{"question": "new?", "answer": str(number)} for number in range(3)]
    convert(open_source(rows_file(folder, rows)), tmp_path / "out", "webdataset", size=2)
    assert "parts of another conversion; it begins anew" in capsys.readouterr().err
    assert [m[0][1]["content"][0]["text"] for m in meanings(open_source(tmp_path / "out"))] == ["0", "1", "2"]


KILLED = """
import os, sys
from pathlib import Path
from data import convert as module
from data.sources import open_source
write = module._write
def half(path, content):
    if path.name == "000002.json":
        for left in ("out/000002.tar.7.new", "out.parts/000002.json.7.new", "images/ab/x.png.7.new"):
            place = Path(sys.argv[2]).parent / left
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"half")
        os._exit(9)
    write(path, content)
module._write = half
module.convert(open_source(sys.argv[1]), Path(sys.argv[2]), "webdataset", size=2)
"""


def test_what_was_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    path = rows_file(folder, ROWS)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")])
    assert done.returncode == 9
    assert convert(open_source(path), tmp_path / "out", "webdataset", size=2).good == 6
    assert meanings(open_source(tmp_path / "out")) == meanings(open_source(path))
    assert not [*tmp_path.glob("*.parts"), *tmp_path.rglob("*.new")]


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    source = open_source(rows_file(folder, ROWS))
    (tmp_path / "out.jsonl").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out, to in ((tmp_path / "out.jsonl", "messages"), (tmp_path / "full", "webdataset")):
        with pytest.raises(UserError, match=f"{out}: is there already; remove it, or name another place"):
            convert(source, out, to)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rows\.jsonl: is what is converted"):
        convert(source, folder / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows are written to a file that ends in \.jsonl"):
        convert(source, tmp_path / "out.json")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_the_command_says_what_it_does_and_fails_above_its_share(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows_file(folder, [*ROWS, BAD[0], BAD[1]])
    arguments = ["data", "convert", str(path), "--workers", "0", "--out"]
    assert main([*arguments, str(tmp_path / "one.jsonl")]) == 1
    told = capsys.readouterr()
    assert f"{path}: 8 rows of captions+qa+llava+documents" in told.out
    assert f"read it with --images {folder / 'images'}" in told.out
    assert told.err == f"vlm data: 2 of 8 rows are broken; they are in {tmp_path / 'one.quarantine.jsonl'}\n"
    for share in ("25%", "0.25"):
        out = tmp_path / f"{share}.jsonl"
        assert main([*arguments, str(out), "--max-bad", share]) == 0
        assert len(open_source(out, folder / "images")) == 6
    assert main([*arguments, str(tmp_path / "more.jsonl"), "--max-bad", "24%"]) == 1
    assert main([*arguments, str(tmp_path / "x.jsonl"), "--format", "lava"]) == 1
    assert main([*arguments, str(tmp_path / "x.jsonl"), "--format", "coco"]) == 1
    for wrong in ("2", "-1%", "x"):
        with pytest.raises(SystemExit):
            main([*arguments, str(tmp_path / "x.jsonl"), "--max-bad", wrong])


def test_columns_are_converted_with_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "WEBP")
    rows = [{"image": {"bytes": file.getvalue(), "path": "a.png"}, "caption": str(number)} for number in range(3)]
    rows.append({"image": {"bytes": b"no image", "path": "a.png"}, "caption": "bad"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = open_source(tmp_path / "rows.parquet")
    (tmp_path / "new").mkdir()
    done = convert(source, tmp_path / "new" / "rows.jsonl")
    assert (done.good, done.bad) == (3, 1)
    again = open_source(tmp_path / "new" / "rows.jsonl")
    assert meanings(again) == [meaning(source[index]) for index in range(3)]
    assert {image.suffix for record in again for image in record.images if isinstance(image, Path)} == {".webp"}
