"""Rows of every format that people have, and what is wrong with the bad ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.formats import CAPTION_PROMPT, read_row
from data.records import IMAGE_PART, Record, text_part
from data.sources import open_source
from vlm import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images with things in and around it that no row may reach."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "../secret.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "empty.png").touch()
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "around").symlink_to(tmp_path)
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    return folder


def user(*parts: str | None) -> dict[str, Any]:
    return {"role": "user", "content": [IMAGE_PART if part is None else text_part(part) for part in parts]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(text)]}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": [text_part(text)]}


def image_and(text: str, image: Any = "a.png") -> list[dict[str, Any]]:
    return [{"type": "image", "image": image}, {"type": "text", "text": text}]


GOOD: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...], list[str], tuple[str, ...]]] = {
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [*image_and("and"), {"type": "image", "image": "sub/c.png"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "two"}], "weight": 1},
                {"role": "user", "content": "<image> is a word"},
                {"role": "assistant", "content": "yes"},
            ],
            "id": 7,
        },
        (system("Be brief."), user(None, "and", None), assistant("two"), user("<image> is a word"), assistant("yes")),
        ["a.png", "sub/c.png"],
        (),
    ),
    "messages of text": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        (user("hi"), assistant("yo")),
        [],
        (),
    ),
    "LLaVA": (
        {
            "id": "1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A cube. <image> is a word."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        (user(None, "What is this?"), assistant("A cube. <image> is a word."), user("Sure?"), assistant("Yes.")),
        ["a.png"],
        (),
    ),
    "LLaVA with the image last": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What?\n<image>"},
                {"from": "gpt", "value": "A cube."},
            ],
        },
        (user("What?", None), assistant("A cube.")),
        ["a.png"],
        (),
    ),
    "LLaVA with several images": (
        {
            "images": ["a.png", "b.png"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "First <image> then <image>\nwhat?"},
                {"from": "assistant", "value": "Cubes."},
            ],
        },
        (system("Be brief."), user("First ", None, " then ", None, "what?"), assistant("Cubes.")),
        ["a.png", "b.png"],
        (),
    ),
    "LLaVA without images": (
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A mark, <image>."}]},
        (user("What?"), assistant("A mark, <image>.")),
        [],
        (),
    ),
    "one caption": (
        {"image": "a.png", "caption": "a cube"},
        (user(None, CAPTION_PROMPT), assistant("a cube")),
        ["a.png"],
        ("a cube",),
    ),
    "a caption with a prompt of null": (
        {"image": "a.png", "caption": "a cube", "prompt": None},
        (user(None, CAPTION_PROMPT), assistant("a cube")),
        ["a.png"],
        ("a cube",),
    ),
    "captions": (
        {"image": "in.png", "captions": ["a cube", "one cube"], "prompt": "say it"},
        (user(None, "say it"), assistant("a cube")),
        ["a.png"],
        ("a cube", "one cube"),
    ),
    "a question": (
        {"image": "sub/../b.png", "question": "what <image>?", "answer": "a cube", "kind": "shape"},
        (user("what ", None, "?"), assistant("a cube")),
        ["b.png"],
        (),
    ),
    "a question with several answers": (
        {"image": "a.png", "question": "what?", "answers": ["x", "a cube", " ", "a cube"]},
        (user(None, "what?"), assistant("a cube")),
        ["a.png"],
        (),
    ),
    "a question with answers as annotators gave them": (
        {"question": "what?", "answers": [{"answer": "x", "confidence": "no"}, {"answer": "y"}]},
        (user("what?"), assistant("x")),
        [],
        (),
    ),
    "a question about several images": (
        {"question": "what?", "answer": "a cube", "images": ["b.png", "a.png"]},
        (user(None, None, "what?"), assistant("a cube")),
        ["b.png", "a.png"],
        (),
    ),
    "messages with their images beside": (
        {
            "images": ["a.png", "b.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "two", "image": None}]},
                {"role": "user", "content": [{"type": "image", "image": "sub/c.png"}]},
                {"role": "assistant", "content": "three"},
            ],
        },
        (user(None, "and", None), assistant("two"), user(None), assistant("three")),
        ["a.png", "b.png", "sub/c.png"],
        (),
    ),
    "a row of an image folder": (
        {"file_name": "a.png", "text": "a cube"},
        (user(None, CAPTION_PROMPT), assistant("a cube")),
        ["a.png"],
        ("a cube",),
    ),
    "a question without an image": (
        {"question": "what?", "answer": "a cube"},
        (user("what?"), assistant("a cube")),
        [],
        (),
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_row_becomes_a_record(root: Path, kind: str) -> None:
    row, messages, images, captions = GOOD[kind]
    paths = tuple((root / name).resolve() for name in images)
    assert read_row(row, "rows:3", root) == Record("rows:3", messages, paths, captions)
    assert read_row(json.loads(json.dumps(row)), "rows:3", root).messages == messages  # the row itself is left alone


def asked(content: Any, answer: Any = "a cube") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def talked(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"word {n}"} for n, role in enumerate(roles)]}


def llava(value: Any, answer: Any = "a cube", **row: Any) -> dict[str, Any]:
    return {**row, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}


def question(**row: Any) -> dict[str, Any]:
    return {"question": "what?", "answer": "a cube", **row}


BAD_IMAGES = {
    "none there": ("none.png", "is not in"),
    "with another suffix": ("sub/c.jpg", r"is not in .* \(there is 'sub/c\.png'\)"),
    "a folder": ("sub", "is not in"),
    "an empty file": ("empty.png", "is an empty file"),
    "up and out": ("../secret.png", "lies outside the image folder"),
    "up, out and back": ("sub/../../secret.png", "lies outside the image folder"),
    "absolute": ("/etc/passwd", "lies outside the image folder"),
    "a link that leads out": ("out.png", "lies outside the image folder"),
    "a linked folder that leads out": ("around/secret.png", "lies outside the image folder"),
    "a link to itself": ("circle.png", "can't be the name of a file|is not in"),
    "a NUL": ("a.png\0.txt", "can't be the name of a file"),
    "half a surrogate pair": ("\ud800.png", "can't be the name of a file"),
    "too long": ("x" * 5000, "can't be the name of a file"),
    "a file below a file": ("a.png/b.png", "is not in"),
    "empty": ("", "named by its path, got ''"),
    "a number": (7, "named by its path, got 7"),
    "an object": ({"name": "a.png"}, "named by its path, got"),
    "a URL": ("https://example.com/a.png", "is an address; pictures aren't fetched"),
}


@pytest.mark.parametrize("image", BAD_IMAGES)
def test_an_image_that_is_not_a_file_in_the_folder_is_named_with_its_line(root: Path, image: str) -> None:
    value, complaint = BAD_IMAGES[image]
    if value != "":  # a column that holds nothing names no picture, a part for a picture has to
        with pytest.raises(UserError, match=f"^rows:3: .*({complaint})"):
            read_row(question(image=value), "rows:3", root)
    with pytest.raises(UserError, match=f"^rows:3: .*({complaint})"):
        read_row(asked(image_and("what?", value)), "rows:3", root)


DOCUMENTS = {
    "OBELICS": {"images": [None, "a.png", None, "b.png"], "texts": ["one", None, "two", None], "metadata": None},
    "MMC4": {
        "text_list": ["one", "two", "three"],
        "image_info": [
            {"image_name": "b.png", "matched_text_index": 2, "matched_sim": 0.3},
            {"image_name": "a.png", "matched_text_index": 1},
        ],
        "similarity_matrix": [],
    },
}


@pytest.mark.parametrize(
    ("kind", "parts"), [("OBELICS", ("one", None, "two", None)), ("MMC4", ("one", None, "two", None, "three"))]
)
def test_a_document_is_texts_and_images_in_turn(root: Path, kind: str, parts: tuple[str | None, ...]) -> None:
    record = read_row(DOCUMENTS[kind], "rows:3", root)
    assert record.kind == "document"
    assert record.messages == ({"role": "document", "content": user(*parts)["content"]},)
    assert record.images == ((root / "a.png").resolve(), (root / "b.png").resolve())
    assert read_row(question(), "rows:3", root).kind == "chat"


BAD: dict[str, tuple[Any, str]] = {
    "an image in a system message": (
        {"messages": [{"role": "system", "content": image_and("x")}, *talked("user", "assistant")["messages"]]},
        "message 1: an image in a system message",
    ),
    "more images beside than parts": (
        {**asked([{"type": "image"}, {"type": "text", "text": "q"}]), "images": ["a.png", "b.png"]},
        "1 image placeholders, but 2 images: 'q' with 'a.png, b.png'",
    ),
    "fewer images beside than parts": (
        {**asked([{"type": "image"}, {"type": "image"}]), "images": ["a.png"]},
        "2 image placeholders, but 1 images",
    ),
    "answers of other kinds": (
        {"question": "q", "answers": ["a", ["b"]]},
        "each of answers must be a text, not a list",
    ),
    "no answers": ({"question": "q", "answers": []}, r"a question without an answer \(answers is a list: '\[\]'\)"),
    "blank answers": ({"question": "q", "answers": [" ", ""]}, "a question without an answer"),
    "captions beside messages": ({**talked("user", "assistant"), "captions": [""]}, "captions must be a list of texts"),
    "a document of unlike lists": ({"texts": ["a"], "images": []}, "lists of the same length"),
    "a document's place with both": ({"texts": ["a"], "images": ["a.png"]}, "position 0 needs an image or a text"),
    "a document's place with none": ({"texts": ["a", None], "images": [None, None]}, "position 1 needs an image or a"),
    "a document of images": ({"texts": [None], "images": ["a.png"]}, "a document without text"),
    "a document's text is a number": ({"texts": [7], "images": [None]}, "position 0 needs an image or a text"),
    "a document's image is not there": ({"texts": ["a", None], "images": [None, "none.png"]}, "is not in"),
    "MMC4: an image of no text": (
        {"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
        "image 0 needs a matched_text_index from 0 to 0",
    ),
    "MMC4: a text is a number": ({"text_list": [7], "image_info": []}, "text_list must be a list of texts"),
    "a list": ([1], "a row is an object, not list"),
    "nothing": (None, "a row is an object, not NoneType"),
    "no keys": ({}, r"unknown kind of row \(keys: none\); known: messages, conversations, captions"),
    "unknown keys": ({"text": "x", "url": "y"}, r"unknown kind of row \(keys: text, url\)"),
    "messages are text": ({"messages": "hi"}, "messages must be a list"),
    "no messages": ({"messages": []}, "no messages"),
    "a message is text": ({"messages": ["hi"]}, "message 1 needs a role of system, user, assistant"),
    "an unknown role": (talked("user", "bot"), "message 2 needs a role of system, user, assistant"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: content must be text or a list of parts"),
    "content is a number": (asked(7), "message 1: content must be text or a list of parts, not int"),
    "a part is text": (asked(["hi"]), "message 1: a part is of type text"),
    "a part of another type": (asked([{"type": "video", "video": "a.mp4"}]), "a part is of type text"),
    "a text part without text": (asked([{"type": "text", "text": 7}]), "a part is of type text"),
    "an image part without image": (asked([{"type": "image"}]), "1 image placeholders, but 0 images"),
    "an image in an answer": (asked("what?", image_and("this")), "message 2: an image in an assistant's answer"),
    "an empty answer": (asked("what?", ""), "message 2: an empty answer"),
    "a blank answer": (asked("what?", " \n\t"), "message 2: an empty answer"),
    "an empty later answer": (
        {
            "messages": [
                *talked("system", "user", "assistant", "user")["messages"],
                {"role": "assistant", "content": ""},
            ]
        },
        "message 5: an empty answer",
    ),
    "the assistant first": (talked("assistant", "user"), "message 1 is from 'assistant', where 'user' is due"),
    "two users": (talked("user", "user", "assistant"), "message 2 is from 'user', where 'assistant' is due"),
    "two after a system": (talked("system", "user", "user"), "message 3 is from 'user', where 'assistant' is due"),
    "a late system": (talked("user", "assistant", "system"), "message 3 is from 'system', where 'user' is due"),
    "no answer at the end": (talked("user", "assistant", "user"), "doesn't end with an assistant's answer"),
    "the system alone": (talked("system"), "doesn't end with an assistant's answer"),
    "LLaVA: text": ({"conversations": "hi"}, "conversations must be a list"),
    "LLaVA: a turn is text": ({"conversations": ["hi"]}, "turn 1 needs a 'from' of human or gpt"),
    "LLaVA: unknown speaker": ({"conversations": [{"from": "cat", "value": "hi"}]}, "turn 1 needs a 'from'"),
    "LLaVA: value is a number": (llava(7), "turn 1 needs a 'from' of human or gpt and a text 'value'"),
    "LLaVA: image without mark": (llava("what?", image="a.png"), "0 image placeholders, but 1 images"),
    "LLaVA: mark without image": (llava("<image>\nwhat?"), "1 image placeholders, but 0 images"),
    "LLaVA: mark and image of null": (llava("what? <image>", image=None), "1 image placeholders, but 0 images"),
    "LLaVA: two marks": (llava("<image> <image> what?", image="a.png"), "2 image placeholders, but 1 images"),
    "LLaVA: mark of an answer": (
        llava("what?", "<image>", image="a.png"),
        "0 image placeholders, but 1 images",
    ),
    "LLaVA: one mark for two": (llava("<image>", images=["a.png", "b.png"]), "1 image placeholders, but 2 images"),
    "caption is a number": ({"image": "a.png", "caption": 7}, "captions must be one text or a list"),
    "no caption": ({"image": "a.png", "captions": []}, "captions must be one text or a list of them, none empty"),
    "an empty caption": ({"image": "a.png", "captions": ["a cube", " "]}, "none empty"),
    "a caption of nothing": ({"caption": "a cube"}, r"a caption belongs to one image, .* names 0 \(keys: caption\)"),
    "prompt is a number": ({"image": "a.png", "caption": "a cube", "prompt": 7}, "prompt must be a text, not int"),
    "question is a list": (question(question=["what?"]), "question must be a text, not a list: "),
    "no answer": ({"question": "what?"}, r"a question without an answer \(keys: question\)"),
    "answer is null": (question(answer=None), r"a question without an answer \(answer is null\)"),
    "half a surrogate pair asked": (question(question="a \ud800?"), "half of a surrogate pair"),
    "half a surrogate pair said": (asked("what?", "a \udfff"), "half of a surrogate pair"),
    "half a surrogate pair in a later caption": (
        {"image": "a.png", "captions": ["a cube", "\ud800"]},
        "half of a surrogate pair",
    ),
    "empty answer to a question": (question(answer=" "), "message 2: an empty answer"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_with_its_line(root: Path, kind: str) -> None:
    row, complaint = BAD[kind]
    with pytest.raises(UserError, match=f"^rows:3: .*{complaint}"):
        read_row(row, "rows:3", root)


def test_errors_of_a_file_carry_its_name_and_the_right_line(root: Path) -> None:
    path = root.parent / "rows.jsonl"
    rows = [question(), question(image="a.png"), None, question(image="../secret.png"), question(answer="")]
    path.write_text("\n".join("" if row is None else json.dumps(row) for row in rows) + "\n")
    source = open_source(path)
    for index, line in ((2, 4), (3, 5)):
        with pytest.raises(UserError) as error:
            source[index]
        assert str(error.value).startswith(f"{path}:{line}: ")


def test_an_image_folder_may_itself_be_a_link(root: Path) -> None:
    link = root.parent / "linked"
    link.symlink_to(root)
    assert read_row(question(image="a.png"), "rows:3", link).images == ((root / "a.png").resolve(),)
    here = Path.cwd()
    os.chdir(root)
    try:
        assert read_row(question(image="a.png"), "rows:3", Path()).images == ((root / "a.png").resolve(),)
    finally:
        os.chdir(here)
