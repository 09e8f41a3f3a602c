"""Parquet and Arrow files, folders that `datasets` saved, folders of images with a metadata file."""

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.pictures import ImageBytes, image_size, load_image
from data.sources import open_source
from vlm import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(rows)


IMAGES = [{"bytes": png(colour), "path": f"{colour}.png"} for colour in (7, 99)]
TALK = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
]
ROWS: dict[str, dict[str, Any]] = {
    "captions": {"image": IMAGES[0], "caption": "a cube"},
    "text": {"image": IMAGES[0], "text": "a cube", "caption": None},
    "answers": {"image": IMAGES[0], "question": "what?", "answers": ["x", "y", "y"]},
    "messages": {"images": [IMAGES[0]], "messages": TALK},
    "LLaVA": {
        "id": 3,
        "image": IMAGES[0],
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}],
    },
    "bare bytes": {"image": IMAGES[0]["bytes"], "caption": "a cube"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_parquet_file_holds_rows_and_images(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS[kind]] * 3), path)
    source = open_source(path)
    assert (source.format, len(source), source.where(2)) == ("hf", 3, f"{path}[2]")
    (image,) = source[2].images
    assert isinstance(image, ImageBytes)
    assert (np.asarray(load_image(image)) == (7, 0, 0)).all()
    assert image_size(image) == (4, 5)
    assert str(image).startswith(f"{path}[2].")
    again = pickle.loads(pickle.dumps(source))
    assert [*again] == [*source]
    assert len(pickle.dumps(source)) < 2000
    with pytest.raises(IndexError):
        source[3]


def test_image_features_are_not_decoded_by_the_library(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = [{"image": {"bytes": b"no image at all", "path": None}, "images": [], "question": "q", "answer": "a"}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    (image,) = open_source(tmp_path / "a.parquet")[0].images
    assert isinstance(image, ImageBytes)
    assert image.data == b"no image at all"
    with pytest.raises(UserError, match=r"a\.parquet\[0\]\.image: not an image"):
        load_image(image)


def test_image_paths_of_columns_are_confined(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for folder in (tmp_path, tmp_path / "rows"):
        (folder / "a.png").write_bytes(png(1))
    names = ["a.png", "../a.png", str(tmp_path / "a.png"), "none.png", None]
    rows = [{"image": {"bytes": None, "path": name}, "caption": "x"} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / "a.parquet")
    source = open_source(tmp_path / "rows" / "a.parquet")
    assert source[0].images == ((tmp_path / "rows" / "a.png").resolve(),)
    for index, complaint in enumerate(["lies outside", "lies outside", "is not in", "the row names 0"], start=1):
        with pytest.raises(UserError, match=rf"a\.parquet\[{index}\]: .*{complaint}"):
            source[index]


def test_folders_of_files_and_what_datasets_saves_are_read(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": f"a{number}"} for number in range(4)]
    expected = [f"a{number}" for number in range(4)]
    (tmp_path / "parquet").mkdir()
    for number in (0, 2):
        pq.write_table(pa.Table.from_pylist(rows[number : number + 2]), tmp_path / "parquet" / f"p-{number}.parquet")
    table(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "arrow").mkdir()
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "arrow" / "rows.arrow").write_bytes(arrow.read_bytes())
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows))
    for name in ("parquet", "parquet/p-*.parquet", "saved", "arrow", "arrow/rows.arrow", "file.arrow"):
        source = open_source(tmp_path / name)
        assert [record.messages[-1]["content"][0]["text"] for record in source] == expected, name
        assert source.format == "hf"
        assert [*pickle.loads(pickle.dumps(source))] == [*source]
    with pytest.raises(UserError, match="its rows are qa, not llava"):
        open_source(tmp_path / "saved", format="llava")


def test_a_split_is_chosen_not_mixed(tmp_path: Path) -> None:
    splits = {name: table([{"question": "q", "answer": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, rows in splits.items():
        rows.to_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    for folder in ("saved", "hub"):
        with pytest.raises(UserError, match=r"holds (the splits|files of) .*; name one: .*@(train|test)"):
            open_source(tmp_path / folder)
        for split in splits:
            source = open_source(f"{tmp_path / folder}@{split}")
            assert [record.messages[-1]["content"][0]["text"] for record in source] == [split]
            assert [*pickle.loads(pickle.dumps(source))] == [*source]
            assert pickle.loads(pickle.dumps(source)).where(0) == f"{tmp_path / folder}@{split}[0]"
        with pytest.raises(UserError, match=r"no (split|files of) dev"):
            open_source(f"{tmp_path / folder}@dev")
    assert len(open_source(tmp_path / "saved" / "train")) == 1


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for count in (1, 2):
        pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": "a"}] * count), path)
        assert len(open_source(path)) == count


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"not one", b"PAR1" + bytes(99) + b"PAR1"])
def test_a_broken_file_is_an_error_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / name}: cannot be read"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_of_images_with_metadata(tmp_path: Path, kind: str) -> None:
    (tmp_path / "train" / "sub").mkdir(parents=True)
    (tmp_path / "train" / "sub" / "a.png").write_bytes(png(1))
    row = {"file_name": "sub/a.png", "text": "a cube"}
    text = json.dumps(row) if kind == "jsonl" else "file_name,text\nsub/a.png,a cube\n"
    (tmp_path / "train" / f"metadata.{kind}").write_text(text)
    source = open_source(tmp_path / "train")
    assert (source[0].captions, source.format) == (("a cube",), "captions")
    assert source[0].images == ((tmp_path / "train" / "sub" / "a.png").resolve(),)
    assert source.where(0) == f"{tmp_path / 'train' / f'metadata.{kind}'}:{1 if kind == 'jsonl' else 2}"
    with pytest.raises(UserError, match="its metadata files are in train; name one of these folders"):
        open_source(tmp_path)


def test_what_is_neither_here_nor_a_hub_id_is_no_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*names: Any, **options: Any) -> None:
        asked.append((names, options))
        raise ConnectionError("no way")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("none", "runs/none", "owner/rows.jsonl", "a/b/c"):
        with pytest.raises(UserError, match=f"{name}: no such data file"):
            open_source(name)
    assert not asked
    failed = r"hub:owner/name.*: cannot be read \(no way\)"
    with pytest.raises(UserError, match=f"^owner/name: no such file or folder here, and as an id of the hub: {failed}"):
        open_source("owner/name")
    with pytest.raises(UserError, match=f"^{failed}"):
        open_source("hub:owner/name:part@train")
    whole, part = {"streaming": False}, {"split": "train", "streaming": False}
    assert asked == [(("owner/name", None), whole), (("owner/name", "part"), part)]


def test_a_files_name_is_no_pattern(tmp_path: Path) -> None:
    for name, rows in (("p[1].parquet", 3), ("p1.parquet", 7)):
        pq.write_table(pa.table({"question": ["?"] * rows, "answer": ["a"] * rows}), tmp_path / name)
    assert len(open_source(tmp_path / "p[1].parquet")) == 3


def test_fingerprints_of_saved_folders_files_and_the_hub_tell_changed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(number: int, answer: str) -> list[str]:
        rows = [{"question": "?", "answer": "a", "image": IMAGES[0]}, {"question": "?", "answer": answer}]
        folder = tmp_path / str(number)
        folder.mkdir()
        table(rows).save_to_disk(str(folder / "saved"))
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table(rows))
        hub = open_source("hub:owner/name").fingerprint()
        monkeypatch.undo()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        return [hub, *(open_source(folder / name).fingerprint() for name in ("saved", "rows.parquet"))]

    first = told(1, "b")
    assert told(2, "b") == first
    assert not {*told(3, "c")} & {*first}
