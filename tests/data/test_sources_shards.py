"""WebDataset tars: written by tarfile, read without unpacking."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.pictures import ImageSlice, image_size, load_image
from data.sources import open_source
from vlm import UserError


def png(colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (5, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, *members: tuple[str, Any] | tarfile.TarInfo, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_picture_with_a_text_is_a_caption(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        ("000.png", png((9, 8, 7))),
        ("000.txt", b" a cube\n"),
        ("001.txt", b"a cat"),
        ("001.png", png()),
    )
    source = open_source(path)
    assert (source.format, len(source)) == ("webdataset", 2)
    assert [record.captions for record in source] == [("a cube",), ("a cat",)]
    (image,) = source[0].images
    assert isinstance(image, ImageSlice)
    assert (np.asarray(load_image(image)) == (9, 8, 7)).all()
    assert image_size(image) == (4, 5)
    assert str(image) == f"{path}/000.png"
    assert [source.where(0), source[1].where] == [f"{path}[000]", f"{path}[001]"]
    again = pickle.loads(pickle.dumps(source))
    assert [*again] == [*source]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path: Path, format: int) -> None:
    long = f"{'d' * 90}/{'e' * 90}/000" if format == tarfile.USTAR_FORMAT else f"ü/{'e' * 300}/000"
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    members = (folder, (f"{long}.png", png()), (f"{long}.txt", b"a cube"), ("b.png", png()), ("b.txt", b"two"))
    source = open_source(shard(tmp_path / "a.tar", *members, format=format))
    assert [record.captions for record in source] == [("a cube",), ("two",)]
    assert source.where(0) == f"{tmp_path / 'a.tar'}[{long}]"


def asked(*images: Any) -> dict[str, Any]:
    parts = [{"type": "image"} if image is None else {"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "this"}]}


TALK = [{"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "this"}]
ROWS: dict[str, tuple[Any, list[str]]] = {
    "messages by suffix": (asked("1.png", "0.png"), ["a.1.png", "a.0.png"]),
    "messages by name": (asked("a.1.png"), ["a.1.png"]),
    "messages in order": (asked(None, None), ["a.0.png", "a.1.png"]),
    "LLaVA by name": ({"image": ["a.1.png", "a.0.png"], "conversations": TALK}, ["a.1.png", "a.0.png"]),
    "LLaVA in order": ({"conversations": TALK}, ["a.0.png", "a.1.png"]),
    "a question": ({"question": "what?", "answer": "this", "image": "0.png"}, ["a.0.png"]),
    "a question in order": ({"question": "what?", "answer": "this"}, ["a.0.png", "a.1.png"]),
    "a document": ({"texts": ["x", None], "images": [None, "1.png"]}, ["a.1.png"]),
    "metadata": ({"url": "u", "key": "a"}, []),
    "one unnamed of two": (asked(None), []),
    "another sample's": (asked("b.png"), []),
    "a caption": ({"caption": "x", "image": "1.png", "width": 7}, ["a.1.png"]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_json_is_a_row_whose_pictures_are_the_samples(tmp_path: Path, kind: str) -> None:
    row, images = ROWS[kind]
    path = shard(tmp_path / "a.tar", ("d/a.json", row), ("d/a.0.png", png()), ("d/a.1.png", png()), ("b.png", png()))
    source = open_source(path)
    if images:
        assert [str(image) for image in source[0].images] == [f"{path}/d/{name}" for name in images]
    else:
        complaint = {"metadata": "unknown kind", "one unnamed of two": "1 image placeholders, but 2 images"}
        with pytest.raises(UserError, match=rf"a\.tar\[d/a\]: .*{complaint.get(kind, 'is not in its sample')}"):
            source[0]
    with pytest.raises(UserError, match=r"a\.tar\[b\]: a sample needs a \.txt, \.caption or \.json"):
        source[1]


def test_metadata_beside_a_text_is_left_alone_and_a_caption_in_it_is_read(tmp_path: Path) -> None:
    members = [("a.jpg", png()), ("a.txt", b"one"), ("a.json", {"url": "u"})]
    members += [("b.jpg", png()), ("b.json", {"caption": "two", "key": "b"})]
    assert [r.captions for r in open_source(shard(tmp_path / "a.tar", *members))] == [("one",), ("two",)]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BAD_SAMPLES: dict[str, tuple[list[Any], str]] = {
    "a link": ([special("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", b"x")], "a.jpg is no plain file"),
    "a device": ([special("a.jpg", tarfile.CHRTYPE), ("a.txt", b"x")], "a.jpg is no plain file"),
    "a file with holes": ([special("a.jpg", tarfile.GNUTYPE_SPARSE), ("a.txt", b"x")], "a.jpg is no plain file"),
    "two of a kind": ([("a.jpg", png()), ("a.jpg", png()), ("a.txt", b"x")], r"two of its files end in \.jpg"),
    "no picture": ([("a.txt", b"x")], "a caption belongs to one image, and the row names 0"),
    "a blank caption": ([("a.jpg", png()), ("a.txt", b" ")], "captions must be one text or a list of them, none empty"),
    "not UTF-8": ([("a.jpg", png()), ("a.txt", b"\xff")], r"byte 1 of its \.txt is no UTF-8"),
    "not JSON": ([("a.jpg", png()), ("a.json", b"{")], "not valid JSON"),
    "a list": ([("a.json", [1])], "a row is an object, not list"),
    "a file outside": ([("a.json", {"question": "q", "answer": "a", "image": "/etc/passwd"})], "is not in its sample"),
    "two captions for pictures": ([("a.0.jpg", png()), ("a.1.jpg", png()), ("a.txt", b"x")], "the row names 2"),
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_broken_sample_is_named_and_the_next_is_read(tmp_path: Path, kind: str) -> None:
    members, complaint = BAD_SAMPLES[kind]
    source = open_source(shard(tmp_path / "a.tar", *members, ("b.jpg", png()), ("b.txt", b"fine")))
    with pytest.raises(UserError, match=rf"^.*a\.tar\[a\]: .*{complaint}"):
        source[0]
    assert source[1].captions == ("fine",)


def test_shards_are_named_by_braces_by_stars_and_by_their_folder(tmp_path: Path) -> None:
    for number in range(12):
        shard(tmp_path / f"s-{number:03d}.tar", (f"{number}.jpg", png()), (f"{number}.txt", f"t{number}".encode()))
    expected = [(f"t{number}",) for number in range(12)]
    for name in ("s-{000..011}.tar", "s-*.tar", "s-0{0,1}*.tar", "."):
        source = open_source(tmp_path / name)
        assert [record.captions for record in source] == expected
        assert source[11].where == f"{tmp_path / 's-011.tar'}[11]"
    assert len(pickle.loads(pickle.dumps(open_source(tmp_path / "s-{003..005}.tar")))) == 3
    with pytest.raises(UserError, match=r"s-012\.tar: no such data file"):
        open_source(tmp_path / "s-{010..012}.tar")


def test_the_indexes_of_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        shard(tmp_path / f"{number}.tar", (f"{number}.jpg", png() + bytes(2 << 20)), (f"{number}.txt", b"x"))
    first = [*open_source(tmp_path)]
    monkeypatch.setattr("data.shards.index_tar", None)
    assert [*open_source(tmp_path)] == first
    assert len([*(tmp_path / "cache" / "index").iterdir()]) == 2


def test_train_and_test_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        shard(tmp_path / f"{name}.tar", ("a.jpg", png()), ("a.txt", name.encode()))
    with pytest.raises(UserError, match=r"holds files of train, validation; name one: .*@train"):
        open_source(tmp_path)
    assert [r.captions for r in open_source(f"{tmp_path}@train")] == [("train-0",), ("train-1",)]
    assert len(open_source(f"{tmp_path}@validation")) == 1
    with pytest.raises(UserError, match="no files of test; there are train, validation"):
        open_source(f"{tmp_path}@test")


def test_a_tar_that_is_none_or_cut_off_is_refused(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", ("a.jpg", png()), ("a.txt", b"x" * 3000), ("b.txt", b"x")).read_bytes()
    cases = {
        "empty": (b"", "not a tar"),
        "text": (b"hello " * 999, "not a tar"),
        "no samples": (bytes(10240), "no samples in it"),
        "half a member": (whole[:3000], "ends in the middle of a.txt; was it cut off"),
        "no end": (
            whole[:5632],
            "has no end; was it cut off",
        ),
        "another behind it": (whole + whole, "something that is no member"),
        "a broken header": (whole[:1024] + b"x" * 512 + whole[1536:], "something that is no member"),
        "packed": (b"\x1f\x8b\x08" + bytes(999), "not a tar, or a compressed one; unpack it"),
    }
    for name, (content, complaint) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path}: .*{complaint}"):
            open_source(path)
    for name in ("a.tar.gz", "a.tgz", "rows.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match="a packed file can't be read row by row; unpack it first"):
            open_source(tmp_path / name)
    for name in ("https://example.com/a-{000..012}.tar", "s3://bucket/a.tar", "pipe:cat a.tar"):
        with pytest.raises(UserError, match="what lies at an address has no row numbers"):
            open_source(name)
