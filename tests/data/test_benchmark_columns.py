"""Benchmarks as data sets of columns, which is how the hub has them."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.benchmarks import Item, find_benchmark
from data.benchmarks.columns import load_items
from data.pictures import image_size, load_image
from vlm.errors import UserError

datasets = pytest.importorskip("datasets")


def png(width: int) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (width, 5), "red").save(data, "PNG")
    return {"bytes": data.getvalue(), "path": f"{width}.png"}


def read(folder: Path, task: str, rows: list[dict[str, Any]], saved: bool = False) -> list[Item]:
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    found = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        found = found.cast_column("image", datasets.Image(decode=False))
    if saved:
        found.save_to_disk(folder / "data")
    else:
        (folder / "data").mkdir()
        found.to_parquet(folder / "data" / "validation.parquet")
    return load_items(find_benchmark(task), folder / "data", None, None)


@pytest.mark.parametrize("saved", [False, True])
def test_vqa_rows_have_their_answers_kinds_and_pictures(tmp_path: Path, saved: bool) -> None:
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    rows = [
        {
            "question_id": 10 + n,
            "question": f"what {n}?",
            "image": png(7 + n),
            "answers": answers,
            "answer_type": "other",
            "question_type": "what",
        }
        for n in range(3)
    ]
    items = read(tmp_path, "vqav2", rows, saved)
    assert [item.id for item in items] == ["10", "11", "12"]
    assert [image_size(item.image) for item in items if item.image] == [(5, 7), (5, 8), (5, 9)]
    assert load_image(items[2].image).size == (9, 5)  # type: ignore[arg-type]
    assert items[0].groups == ("accuracy/other", "question_type/what")
    scores = find_benchmark("vqav2").score(items, {"10": "red", "11": "Red", "12": None})
    assert scores.per_item == {"10": 100, "11": 0, "12": 0}  # all annotators agree, so case counts


@pytest.mark.parametrize(
    ("task", "row", "references", "answer"),
    [
        ("textvqa", {"question_id": 5, "question": "what?", "answers": ["red"] * 10}, ("red",) * 10, "Red,"),
        ("vizwiz", {"question_id": "a.jpg", "question": "what?", "answers": ["red"] * 10}, ("red",) * 10, "red"),
        ("pope", {"id": "5", "question": "is there?", "answer": "Yes"}, ("yes",), "Yes, there is."),
        ("gqa", {"id": "5", "question": "what?", "answer": "red"}, ("red",), "Red."),
        ("scienceqa", {"question": "which?", "choices": ["x", "y"], "answer": 1, "hint": ""}, ("B",), "B"),
        ("mmbench", {"index": 5, "question": "which?", "A": "x", "B": "y", "C": "nan", "answer": "B"}, ("B",), "B."),
        ("coco-caption", {"question_id": "5", "answer": ["a dog", "the dog"]}, ("a dog", "the dog"), "a dog"),
        ("exact", {"id": 5, "question": "what?", "answer": "red"}, ("red",), "red"),
    ],
)
def test_every_task_reads_the_columns_of_its_publishers(
    tmp_path: Path, task: str, row: dict[str, Any], references: tuple[str, ...], answer: str
) -> None:
    (item,) = read(tmp_path, task, [{**row, "image": png(6)}])
    assert item.references == references
    assert item.image is not None
    assert load_image(item.image).size == (6, 5)
    if task != "coco-caption":
        assert find_benchmark(task).score([item], {item.id: answer}).metrics["accuracy"] in (1, 100)


def test_rows_without_a_picture_have_none(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "what?", "answer": "x", "image": png(6)}]
    rows.append({**rows[0], "id": "b", "image": None})
    assert [item.image is None for item in read(tmp_path, "exact", rows)] == [False, True]


def test_questions_of_gqa_keep_their_kinds(tmp_path: Path) -> None:
    types = [
        {"structural": "query", "semantic": "rel", "detailed": "x"},
        {"structural": "verify", "semantic": None, "detailed": "x"},
        {"structural": None, "semantic": "obj", "detailed": None},
    ]
    row = {"question": "what?", "answer": "red", "image": png(5)}
    rows = [{**row, "id": str(n), "types": one, "isBalanced": n < 2} for n, one in enumerate(types)]
    items = read(tmp_path, "gqa", rows)
    assert [item.references for item in items] == [("red",), ("red",), ()]
    assert [item.groups for item in items] == [
        ("accuracy/open", "structural/query", "semantic/rel"),
        ("accuracy/binary", "structural/verify"),
        ("semantic/obj",),
    ]


def test_a_folder_of_pictures_beside_rows_that_hold_them_is_refused(tmp_path: Path) -> None:
    read(tmp_path, "gqa", [{"id": "1", "question": "what?", "answer": "red", "image": png(5)}])
    for task in ("gqa", "mmbench"):
        data = next(tmp_path.rglob("*.parquet")) if task == "gqa" else tmp_path / "mmbench.tsv"
        with pytest.raises(UserError, match=r"pictures are in its .*leave the folder .* out"):
            load_items(find_benchmark(task), data, tmp_path, None)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\[0\]: needs a column 'question', to be a question of gqa"):
        read(tmp_path, "gqa", [{"id": "a", "answer": "x", "image": png(5)}])


def test_a_task_about_pictures_is_not_asked_without(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'image' in it, and gqa is asked about pictures"):
        read(tmp_path, "gqa", [{"id": "a", "question": "what?", "answer": "x"}])


def test_questions_and_answers_are_text(tmp_path: Path) -> None:
    (item,) = read(tmp_path, "exact", [{"id": "a", "question": "what?", "answer": 3}])
    assert item.references == ("3",)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"data\[0\]: questions and answers are text, to be a question of gqa"):
        read(tmp_path / "b", "gqa", [{"id": "a", "question": "what?", "answer": 3, "image": png(5)}])
