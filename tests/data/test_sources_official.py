"""Data sets as they are published, each written here in a few rows with the keys and the order of the real files."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.formats import CAPTION_PROMPT, SHORT_ANSWER
from data.records import Record
from data.sources import Source, open_source
from vlm import UserError

TOLD = {"info": {"description": "x", "version": "1"}, "license": {"url": "u", "name": "n"}}


def write(path: Path, value: Any, indent: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent), encoding="utf-8")
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)
    return path.resolve()


def said(record: Record) -> tuple[str, str]:
    question, answer = record.messages
    return question["content"][-1]["text"], answer["content"][0]["text"]


def same_after_pickling(source: Source) -> None:
    again = pickle.loads(pickle.dumps(source))
    assert [*again] == [*source]
    assert (again.format, again.path, again.images) == (source.format, source.path, source.images)
    assert len(pickle.dumps(source)) < 2000


QUESTIONS = {
    **TOLD,
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "What is it?", "question_id": 9001},
        {"image_id": 9, "question": "How many {}?", "question_id": 9000},
        {"image_id": 25, "question": "Where?", "question_id": 25000},
    ],
}
ANNOTATIONS = {
    **TOLD,
    "data_subtype": "train2014",
    "annotations": [
        {"question_id": 9000, "image_id": 9, "multiple_choice_answer": "2", "answers": [{"answer": "two"}]},
        {"question_id": 9001, "image_id": 9, "multiple_choice_answer": "a cat", "answers": []},
        {"question_id": 7, "image_id": 1, "multiple_choice_answer": "of another question"},
    ],
}
NAMES = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json")


@pytest.mark.parametrize(
    "names", [NAMES, ("OpenEnded_x_questions.json", "x_annotations.json"), ("q.json", "my annotations.json")]
)
@pytest.mark.parametrize("image", ["COCO_train2014_000000000009.jpg", "000000000009.jpg", "train2014/000000000009.jpg"])
@pytest.mark.parametrize("indent", [None, 1])
def test_vqav2(tmp_path: Path, names: tuple[str, str], image: str, indent: int | None) -> None:
    questions = write(tmp_path / names[0], QUESTIONS, indent)
    write(tmp_path / names[1], ANNOTATIONS, indent)
    found = picture(tmp_path / "images" / image)
    source = open_source(questions)
    assert (source.format, len(source)) == ("vqav2", 3)
    assert said(source[0]) == (SHORT_ANSWER.format(question="What is it?"), "a cat")
    assert said(source[1]) == (SHORT_ANSWER.format(question="How many {}?"), "2")
    assert source[1].images == (found,)
    assert source[1].where == source.where(1) == f"{questions}[1]"
    with pytest.raises(UserError, match=r"^.*\[2\]: question 25000 has no answer in "):
        source[2]


def test_vqav2_answers_may_be_named_and_are_needed(tmp_path: Path) -> None:
    questions = write(tmp_path / "a" / "questions.json", {**QUESTIONS, "questions": QUESTIONS["questions"][:2]})
    answers = write(tmp_path / "b" / "answers.json", ANNOTATIONS)
    picture(tmp_path / "a" / "9.jpg")
    with pytest.raises(UserError, match=r"questions\.json: questions without answers; no annotations\.json beside it"):
        open_source(questions)
    beside = open_source(f"{questions}+{write(tmp_path / 'a' / 'mine.json', ANNOTATIONS).name}")
    assert [said(record)[1] for record in beside] == ["a cat", "2"]
    (tmp_path / "a" / "mine.json").unlink()
    source = open_source(f"{questions}+{answers}")
    assert [said(record)[1] for record in source] == ["a cat", "2"]
    same_after_pickling(source)
    with pytest.raises(UserError, match=r"answers\.json: a file of annotations; name that of the questions"):
        open_source(answers)


@pytest.mark.parametrize("order", [("images", "licenses"), ("licenses", "images")])
def test_coco_captions_are_a_row_an_image(tmp_path: Path, order: tuple[str, str]) -> None:
    parts = {
        "images": [
            {"license": 5, "file_name": "COCO_train2014_000000057870.jpg", "id": 57870, "height": 480},
            {"license": 5, "file_name": "COCO_train2014_000000000001.jpg", "id": 1, "height": 480},
        ],
        "licenses": [{"url": "u", "id": 1, "name": "n"}],
    }
    captions = [(57870, "a room"), (1, "a tree"), (57870, "tables and chairs"), (2, "nowhere"), (57870, "chairs")]
    annotations = [{"image_id": i, "id": n, "caption": caption} for n, (i, caption) in enumerate(captions)]
    file = {"info": TOLD["info"], **{name: parts[name] for name in order}, "annotations": annotations}
    path = write(tmp_path / "captions_train2014.json", file)
    first, second = (picture(tmp_path / "train2014" / row["file_name"]) for row in parts["images"])
    source = open_source(path)
    assert (source.format, len(source)) == ("coco", 3)
    assert source[0].captions == ("a room", "tables and chairs", "chairs")
    assert said(source[0]) == (CAPTION_PROMPT, "a room")
    assert (source[0].images, source[1].images) == ((first,), (second,))
    assert source[1].captions == ("a tree",)
    with pytest.raises(UserError, match=r"\[2\]: captions of image 2, which 'images' doesn't list"):
        source[2]


def test_an_image_of_coco_without_captions_is_a_broken_row(tmp_path: Path) -> None:
    rows = {"images": [{"file_name": "a.jpg", "id": 1}, {"id": 2}], "annotations": [{"image_id": 3, "caption": "x"}]}
    source = open_source(write(tmp_path / "captions.json", rows))
    for index, why in enumerate(["captions must be", "an image needs a file_name", "doesn't list"]):
        with pytest.raises(UserError, match=rf"captions\.json\[{index}\]: .*{why}"):
            source[index]
    rows.pop("annotations")
    with pytest.raises(UserError, match="it has no list 'annotations'"):
        open_source(write(tmp_path / "image_info_test2014.json", rows))


def test_textvqa_learns_the_most_frequent_answer(tmp_path: Path) -> None:
    row = {"question": "what brand?", "image_id": "0054c91397f2fe05", "image_classes": ["x"], "question_id": 0}
    rows = [
        {**row, "answers": ["nokia", "nous", "toshiba", "nous", "", "nokia", "nous"], "set_name": "train"},
        {**row, "answers": ["b", "a", "a", "b"]},
        {**row, "image_id": "none"},
    ]
    path = write(tmp_path / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "dataset_name": "t", "data": rows})
    found = picture(tmp_path / "train_images" / "0054c91397f2fe05.jpg")
    source = open_source(path)
    assert (source.format, len(source)) == ("textvqa", 3)
    assert said(source[0]) == (SHORT_ANSWER.format(question="what brand?"), "nous")
    assert said(source[1])[1] == "b"  # the first of the most frequent
    assert source[0].images == (found,)
    with pytest.raises(UserError, match=r"train\.json\[2\]: a question without an answer \(answer is null\)"):
        source[2]


def test_gqa_is_keyed_by_question(tmp_path: Path) -> None:
    row = {"semantic": [{"operation": "select", "dependencies": []}], "entailed": [], "imageId": "2375429"}
    more = {"isBalanced": True, "groups": {"global": None}, "fullAnswer": "The pole is metal."}
    rows = {
        "07333408": {**row, "question": "What is on the wall?", "answer": "pipe", **more},
        "07333405": {**row, "question": "Is it metal?", "answer": "yes", **more, "imageId": "none"},
        "ü": {**row, "question": "No answer?"},
    }
    path = write(tmp_path / "train_balanced_questions.json", rows, indent=1)
    found = picture(tmp_path / "images" / "2375429.jpg")
    source = open_source(path)
    assert (source.format, len(source)) == ("gqa", 3)
    assert said(source[0]) == (SHORT_ANSWER.format(question="What is on the wall?"), "pipe")
    assert (source[0].images, source[0].where) == ((found,), f"{path}[07333408]")
    with pytest.raises(UserError, match=r"\[07333405\]: image 'none.jpg' is not in"):
        source[1]
    with pytest.raises(UserError, match=r"\[ü\]: a question without an answer \(answer is null\)"):
        source[2]


CAPTIONS = [("b.jpg", "a dog"), ("b.jpg", "one dog , running"), ("a.jpg", "a cat"), ("b.jpg", "it's a dog")]


def flickr(folder: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(folder / "Images" / name)


@pytest.mark.parametrize("kind", ["token", "table", "pipes"])
def test_flickr_captions_are_a_row_an_image(tmp_path: Path, kind: str) -> None:
    flickr(tmp_path)
    if kind == "token":
        lines = [f"{name}#{n}\t{caption}" for n, (name, caption) in enumerate(CAPTIONS)]
        path = write(tmp_path / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    elif kind == "table":
        path = write(tmp_path / "captions.txt", "image,caption\n" + "".join(f'{n},"{c}"\n' for n, c in CAPTIONS))
    else:
        lines = ["image_name| comment_number| comment", *(f"{n}| 0| {c}" for n, c in CAPTIONS)]
        path = write(tmp_path / "results.csv", "\n".join(lines))
    source = open_source(path, format="flickr" if kind == "pipes" else None)
    assert (source.format, len(source)) == ("flickr", 2)
    assert source[0].captions == ("a dog", "one dog , running", "it's a dog")
    assert source[1].captions == ("a cat",)
    assert source[1].images == ((tmp_path / "Images" / "a.jpg").resolve(),)
    assert source.where(1) == f"{path}:{3 if kind == 'token' else 4}"
    same_after_pickling(source)


def test_broken_lines_of_flickr_are_rows_of_their_own(tmp_path: Path) -> None:
    flickr(tmp_path)
    path = write(tmp_path / "token.txt", "a.jpg#0\ta cat\nno tab\n\nb.jpg\tno number\na.jpg#1\ttwo\n")
    source = open_source(path)
    assert (len(source), source[0].captions) == (3, ("a cat", "two"))
    for index, line in ((1, 2), (2, 4)):
        with pytest.raises(UserError, match=rf"token\.txt:{line}: a line is picture\.jpg#number, a tab and a caption"):
            source[index]


def test_karpathys_splits_are_not_mixed(tmp_path: Path) -> None:
    flickr(tmp_path)
    sentence = {"tokens": ["a", "dog"], "imgid": 0, "sentid": 0}
    images = [
        {"sentids": [0], "imgid": 0, "sentences": [{**sentence, "raw": c}], "split": split, "filename": "b.jpg"}
        for split, c in (("train", "one"), ("test", "two"), ("train", "three"), ("val", "four"))
    ]
    path = write(tmp_path / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    with pytest.raises(UserError, match=r"holds the splits train, test, val; name one: .*dataset_flickr8k\.json@train"):
        open_source(path)
    train, both = open_source(f"{path}@train"), open_source(f"{path}@val+test")
    assert [record.captions for record in train] == [("one",), ("three",)]
    assert [record.captions for record in both] == [("two",), ("four",)]
    assert (train.where(1), train.format) == (f"{path}[2]", "flickr")
    same_after_pickling(both)
    with pytest.raises(UserError, match="no split dev; there are train, test, val"):
        open_source(f"{path}@dev")
    alone = write(tmp_path / "alone.json", {"images": images[:1], "dataset": "flickr8k"})
    assert len(open_source(alone)) == 1


@pytest.mark.parametrize("given", ["vqav2", "coco", "textvqa", "gqa", "flickr", "hf", "webdataset"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, given: str) -> None:
    path = write(tmp_path / "rows.jsonl", '{"question": "what?", "answer": "this"}\n')
    with pytest.raises(UserError, match=rf"rows\.jsonl: not a file of {given}, but of qa"):
        open_source(path, format=given)


def test_official_files_go_through_pickle_and_their_format_may_be_said(tmp_path: Path) -> None:
    picture(tmp_path / "9.jpg")
    questions = write(tmp_path / NAMES[0], {**QUESTIONS, "questions": QUESTIONS["questions"][:2]})
    write(tmp_path / NAMES[1], ANNOTATIONS)
    gqa = write(tmp_path / "gqa.json", {"1": {"imageId": "9", "question": "q?", "answer": "a"}})
    text = write(tmp_path / "text.json", {"data": [{"image_id": "9", "question": "q?", "answers": ["a"]}]})
    rows = {"images": [{"file_name": "9.jpg", "id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}
    for path, name in (
        (questions, "vqav2"),
        (gqa, "gqa"),
        (text, "textvqa"),
        (write(tmp_path / "c.json", rows), "coco"),
    ):
        source = open_source(path, format=name)
        assert [*source]
        same_after_pickling(source)
    with pytest.raises(UserError, match=r"gqa\.json: not a file of vqav2, but of gqa"):
        open_source(gqa, format="vqav2")
