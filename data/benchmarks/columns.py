"""Benchmarks from data sets of `datasets`: Parquet files, saved folders, ids of its hub, by the columns they have."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.benchmarks import mmbench
from data.benchmarks.base import Benchmark, Item
from data.benchmarks.choice import Problem, make_item
from data.benchmarks.gqa import Types, groups
from data.benchmarks.vqa import objects
from data.columns import HUB, Columns
from data.pictures import ImageRef, ImageRow
from data.sources import open_source
from vlm.errors import UserError

Row = dict[str, Any]
ASKED_WITHOUT = ("scienceqa",)  # tasks with questions about no picture
PICTURE_KEYS = ("image_id", "imageId", "image_source")  # columns that tell which rows show the same one


def load_items(benchmark: Benchmark, data: Path, images: Path | None, split: str | None) -> list[Item]:
    """The questions of official files, or of a data set with the columns that its publishers gave it on the hub."""
    if _is_columns(data) and benchmark.task != "exact":  # whose rows are those of training, in columns, too
        if images is not None:
            raise UserError(f"{data}: its pictures are in its rows; leave the folder {images} out")
        return _column_items(benchmark.task, data, split)
    return benchmark.items(data, images, split)


def _is_columns(data: Path) -> bool:
    """Not a folder or a file of the official kind."""
    name = str(data)
    if name.startswith(HUB) or (name.count("/") == 1 and not data.suffix and not data.parent.is_dir()):
        return True
    if data.is_dir():
        return any((data / file).is_file() for file in ("state.json", "dataset_dict.json")) or any(
            True for folder in (data, data / "data") for _ in folder.glob("*.parquet")
        )
    return data.suffix == ".parquet" or "@" in data.name


def _column_items(task: str, data: Path, split: str | None) -> list[Item]:
    """The questions of a data set; UserError for columns that are missing, and for rows that can't be read."""
    source = open_source(f"{data}@{split}" if split else str(data))
    if not isinstance(source, Columns):
        raise UserError(f"{data}: not a data set of columns")
    if task not in ASKED_WITHOUT and not source.has_images:
        raise UserError(f"{data}: no column 'image' in it, and {task} is asked about pictures")
    make = _READERS[task]
    items = []
    for index, (row, image) in enumerate(source.without_images()):
        told = {key: value for key, value in row.items() if value is not None}
        name = next((str(told[key]) for key in PICTURE_KEYS if key in told), image)
        try:
            item = make(told, index, None if image is None else ImageRow(source, index, f"{data}: {name}"))
            if not isinstance(item.question, str) or not all(isinstance(text, str) for text in item.references):
                raise ValueError("questions and answers are text")
            items.append(item)
        except (KeyError, TypeError, ValueError) as error:
            why = f"needs a column {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{source.where(index)}: {why}, to be a question of {task}") from None
    return items


def _vqa(row: Row, index: int, image: ImageRef | None) -> Item:
    answers = row.get("answers", [])
    texts = tuple(one["answer"] if isinstance(one, dict) else one for one in answers)
    kinds = (("accuracy", "answer_type"), ("accuracy", "category"), ("question_type", "question_type"))
    groups = tuple(f"{name}/{row[key]}" for name, key in kinds if key in row)
    told_apart = objects(answers) if answers and isinstance(answers[0], dict) else None
    return Item(_id(row, index, "question_id"), row["question"], texts, image, groups, told_apart)


def _text_vqa(row: Row, index: int, image: ImageRef | None) -> Item:
    return Item(_id(row, index, "question_id"), row["question"], tuple(row.get("answers", ())), image)


def _pope(row: Row, index: int, image: ImageRef | None) -> Item:
    label = str(row.get("label", row.get("answer"))).lower()
    if label not in ("yes", "no"):
        raise ValueError(f"the label {label!r} is neither yes nor no")
    # question ids begin anew in each of its three parts
    return Item(_id(row, index, "id"), row.get("text") or row["question"], (label,), image)


def _gqa(row: Row, index: int, image: ImageRef | None) -> Item:
    types = row.get("types")
    kinds = groups(Types(types.get("structural"), types.get("semantic"))) if isinstance(types, dict) else ()
    references = (row["answer"],) if row.get("isBalanced", True) else ()
    return Item(_id(row, index, "id", "question_id"), row["question"], references, image, kinds)


def _science_qa(row: Row, index: int, image: ImageRef | None) -> Item:
    fields = {name: row[name] for name in ("question", "choices", "answer", "hint", "subject", "grade") if name in row}
    return make_item(_id(row, index, "id"), Problem(**fields, image="" if image is None else str(image)), image)


def _mmbench(row: Row, index: int, image: ImageRef | None) -> Item:
    item = mmbench.make_item(row, image)
    assert image is None or isinstance(image, ImageRow)
    if image is None:
        return item
    # each row of a circle has a copy of the picture
    return replace(item, image=replace(image, key=f"circle {image.rows.where(mmbench.circle_of(item))}"))


def _captions(row: Row, index: int, image: ImageRef | None) -> Item:
    captions: Any = row.get("captions", row.get("answer", row.get("sentences", row.get("caption", ()))))
    texts: list[str] = [captions] if isinstance(captions, str) else list(captions)
    return Item(_id(row, index, "image_id", "question_id", "id"), "", tuple(texts), image)


def _id(row: Row, index: int, *names: str) -> str:
    return str(next((row[name] for name in names if name in row), index))


_READERS: dict[str, Callable[[Row, int, ImageRef | None], Item]] = {
    "vqav2": _vqa,
    "vizwiz": _vqa,
    "textvqa": _text_vqa,
    "pope": _pope,
    "gqa": _gqa,
    "scienceqa": _science_qa,
    "mmbench": _mmbench,
    "coco-caption": _captions,
}
