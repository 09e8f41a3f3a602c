"""Files as VQAv2, COCO captions, TextVQA and GQA publish them: objects with arrays inside, and objects keyed by id."""

import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.formats import SHORT_ANSWER
from data.index import Arrays, indexed
from data.lines import strip_comma
from data.progress import Tell
from data.rows import Bytes, FileRows, Source, find_name, key_of, parse
from data.scanner import Scanner
from vlm.errors import UserError

_SETS = ("train2014", "val2014", "train2017", "val2017", "test2015")


class Official(FileRows):
    """The elements of one array in an object; `format` and `array` are a subclass's."""

    list_name: str
    name: str
    row_kind = "qa"

    def __init__(self, path: Path, images: Path | None = None) -> None:
        super().__init__(path, images, self.row_kind)
        self.format = self.name
        self._folders = coco_sets(path)

    def __reduce__(self) -> tuple[type[Source], tuple[Any, ...]]:
        return type(self), (self.path, self.images)

    def _index(self) -> Arrays:
        return index_arrays(self.path, {self.list_name: ()})

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def _element(self, index: int) -> dict[str, Any]:
        return element(self._read(index), self.where(index))


class TextVQA(Official):
    """{"data": [{"question", "image_id", "answers": [ten of them]}]}; pictures are IMAGE_ID.jpg, as in train_images."""

    list_name, name = "data", "textvqa"

    def _index(self) -> Arrays:
        return {"starts": super()._index()["data.starts"]}

    def row(self, index: int) -> dict[str, Any]:
        row = self._element(index)
        names = [f"{folder}{row.get('image_id')}.jpg" for folder in ("", "train_images/", "test_images/")]
        return asked(row, row.get("answers"), find_name(self.images, names))


class GQA(Official):
    """{id: {"question", "imageId", "answer", "fullAnswer"}}: the short answer is learned, as it is what's scored."""

    name = "gqa"

    def _index(self) -> Arrays:
        def build(file: BinaryIO, tell: Tell) -> Arrays:
            scanner = Scanner(file, self.path, tell)
            starts, keys, end = [], [], 0
            for _ in scanner.members():
                keys.append(scanner.key_offset)
                start, end, _ = scanner.value()
                starts.append(start)
            scanner.end()
            return {"starts": np.array([*starts, end], np.int64), "keys": np.array([*keys, end], np.int64)}

        return indexed("keyed", self.path, build)

    def where(self, index: int) -> str:
        key = self._file.read(int(self._arrays["keys"][index]), int(self._starts[index]), self.path.__str__)
        return f"{self.path}[{parse(key.rstrip().removesuffix(b':'), self.path.__str__)}]"

    def row(self, index: int) -> dict[str, Any]:
        where, next_key = self.where(index), int(self._arrays["keys"][index + 1])
        row = element(self._file.read(int(self._starts[index]), next_key, where.__str__), where)
        names = [f"{folder}{row.get('imageId')}.jpg" for folder in ("", "images/")]
        return asked(row, row.get("answer"), find_name(self.images, names))


class VQAv2(Official):
    """The questions file; answers come from the annotations file beside it (multiple_choice_answer)."""

    list_name, name = "questions", "vqav2"

    def __init__(self, path: Path, images: Path | None = None, annotations: Path | None = None) -> None:
        self.annotations = annotations or find_annotations(path)
        if not self.annotations.is_file():
            raise UserError(f"{self.annotations}: no such annotations file")
        super().__init__(path, images)
        self._answers = index_arrays(self.annotations, {"annotations": ("question_id",)})
        self._order = np.argsort(self._answers["annotations.question_id"], kind="stable")
        self._ids = self._answers["annotations.question_id"][self._order]
        self._answer_file = Bytes(self.annotations)

    def __reduce__(self) -> tuple[type[Source], tuple[Any, ...]]:
        return type(self), (self.path, self.images, self.annotations)

    def _index(self) -> Arrays:
        return {"starts": super()._index()["questions.starts"]}

    def row(self, index: int) -> dict[str, Any]:
        row = self._element(index)
        annotation = self._annotation(row.get("question_id"), self.where(index))
        answer = annotation.get("multiple_choice_answer", annotation.get("answers"))
        return asked(row, answer, find_name(self.images, coco_names(row.get("image_id"), self._folders)))

    def files(self) -> list[Path]:
        return [self.path, self.annotations]

    def _annotation(self, question: Any, where: str) -> dict[str, Any]:
        place = int(np.searchsorted(self._ids, key_of(question)))
        if place == len(self._ids) or self._ids[place] != key_of(question):
            raise UserError(f"{where}: question {question} has no answer in {self.annotations}")
        number = int(self._order[place])
        starts = self._answers["annotations.starts"]
        named = f"{where}: {self.annotations}[{number}]"
        return element(self._answer_file.read(int(starts[number]), int(starts[number + 1]), named.__str__), named)


class COCO(Official):
    """captions_train2014.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

    A row an image, with all its captions; captions of images that aren't listed are (broken) rows, too.
    """

    list_name, name, row_kind = "images", "coco", "captions"

    def _index(self) -> Arrays:
        arrays = index_arrays(self.path, {"images": ("id",), "annotations": ("image_id",)})
        images, captions = arrays["images.id"], arrays["annotations.image_id"]
        self._order = np.argsort(captions, kind="stable")
        self._captioned = captions[self._order]
        self._orphans = np.setdiff1d(captions, images)
        return {**arrays, "starts": arrays["images.starts"]}

    def __len__(self) -> int:
        return super().__len__() + len(self._orphans)

    def row(self, index: int) -> dict[str, Any]:
        where, images = self.where(index), super().__len__()
        if index >= images:
            raise UserError(f"{where}: captions of image {self._orphans[index - images]}, which 'images' doesn't list")
        row = self._element(index)
        first, last = (int(np.searchsorted(self._captioned, key_of(row.get("id")), side)) for side in ("left", "right"))
        captions = [self._caption(int(number), where) for number in self._order[first:last]]
        name = row.get("file_name")
        if not isinstance(name, str):
            raise UserError(f"{where}: an image needs a file_name")
        names = [name, *(f"{folder}/{name}" for folder in self._folders), *coco_names(row.get("id"), self._folders)]
        return {"image": find_name(self.images, names), "captions": captions}

    def _caption(self, number: int, row: str) -> Any:
        starts = self._arrays["annotations.starts"]
        where = f"{row}: its caption, annotation {number}"
        return element(self._file.read(int(starts[number]), int(starts[number + 1]), where.__str__), where).get(
            "caption"
        )


def asked(row: dict[str, Any], answer: Any, image: str) -> dict[str, Any]:
    """A question in the words in which the benchmarks ask it."""
    question = row.get("question")
    text = SHORT_ANSWER.format(question=question) if isinstance(question, str) else question
    return {"image": image, "question": text, "answer": answer}


def index_arrays(path: Path, wanted: dict[str, tuple[str, ...]]) -> Arrays:
    """`array.starts` of the object's arrays, and for each of their ids `array.id` as integers (`key_of`)."""

    def build(file: BinaryIO, tell: Tell) -> Arrays:
        scanner = Scanner(file, path, tell)
        found: Arrays = {}
        for name in scanner.members():
            if name not in wanted or scanner.peek() != "[":
                scanner.skip()
                continue
            starts, end = array("q"), scanner.offset
            ids = {key: array("q") for key in wanted[str(name)]}
            for _ in scanner.members():
                start, end, row = scanner.value()
                starts.append(start)
                for key, values in ids.items():
                    values.append(key_of(row.get(key) if isinstance(row, dict) else None))
            starts.append(end)
            found[f"{name}.starts"] = np.array(starts, np.int64)
            found.update({f"{name}.{key}": np.array(values, np.int64) for key, values in ids.items()})
        scanner.end()
        if missing := [name for name in wanted if f"{name}.starts" not in found]:
            raise UserError(f"{path}: not the file that is needed: it has no list {', '.join(map(repr, missing))}")
        return found

    return indexed(f"arrays {sorted(wanted.items())}", path, build)


def element(text: bytes, where: str) -> dict[str, Any]:
    row = parse(strip_comma(text), where.__str__)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object, not {type(row).__name__}")
    return row


def find_annotations(questions: Path) -> Path:
    """v2_OpenEnded_mscoco_train2014_questions.json -> v2_mscoco_train2014_annotations.json, or the only one there."""
    name = questions.name
    tried = dict.fromkeys(
        re.sub("questions", "annotations", re.sub(begin, "", name)) for begin in ("OpenEnded_|MultipleChoice_", "$^")
    )
    for candidate in (questions.with_name(other) for other in tried if other != name):
        if candidate.is_file():
            return candidate
    others = sorted(path for path in questions.parent.glob("*annotations*.json") if path != questions)
    if len(others) == 1:
        return others[0]
    raise UserError(
        f"{questions}: questions without answers; no {' or '.join(tried)} beside it "
        f"(name both files: {questions}+ANNOTATIONS.json)"
    )


def coco_sets(path: Path) -> tuple[str, ...]:
    """The image sets that a file may be of, the one in its name first."""
    return tuple(sorted(_SETS, key=lambda name: name not in path.name))


def coco_names(image: Any, sets: Sequence[str]) -> list[str]:
    """What COCO's picture of this number may be called: by the official names, and plainly by its number."""
    if type(image) is not int:
        return [f"{image}.jpg"]
    official = [f"COCO_{name}_{image:012d}.jpg" for name in sets]
    plain = f"{image:012d}.jpg"
    inside = [f"{folder}/{name}" for folder, name in zip(sets, official, strict=True)]
    return [official[0], plain, inside[0], f"{sets[0]}/{plain}", *official[1:], *inside[1:], f"{image}.jpg"]
