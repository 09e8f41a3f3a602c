"""Rows of which something would be lost: refused with the key, or with what is meant instead."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.formats import read_row
from data.pictures import ImageBytes
from tests.data.row_kinds import chat, qa, talk
from vlm import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "3.jpg", "sub/4.jpg"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 2)).save(out, "PNG")
    return out.getvalue()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unpaired preferences of messages": (
        chat("q", label=False),
        "the key label: it says whether the answer is a good one",
    ),
    "unpaired preferences of LLaMA-Factory": (chat("q", kto_tag=True), "the key kto_tag: it says whether the answer"),
    "boxes beside messages": (
        chat("where is <ref-object>?", objects={"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]}),
        "the key objects: its objects and boxes aren't put into texts",
    ),
    "a caption with a mark": (
        {"image": "1.jpg", "text": "<image>a cube"},
        "a caption with an <image> in it: '<image>a cube'",
    ),
    "a picture as the input": (
        {"instruction": "describe", "input": "1.jpg", "output": "a"},
        r"the key input names '1\.jpg'",
    ),
    "a picture as the question": ({"input": "1.jpg", "output": "a"}, r"the key input names '1\.jpg', which isn't read"),
    "a picture to be made": (
        {"image": "1.jpg", "instruction": "make it blue", "target": "2.jpg"},
        r"the key target names '2\.jpg', which isn't read",
    ),
    "a video": (qa(video="1.mp4"), "the key video: it holds video or sound"),
    "videos beside messages": (chat("<video>q", videos=["1.mp4"]), "the key videos: it holds video or sound"),
    "an audio": (qa(audio={"path": "a.wav", "bytes": None}), "the key audio: it holds video or sound"),
    "another picture": (
        qa(image="1.jpg", depth="depth/1_d.png"),
        r"the key depth names 'depth/1_d\.png', which isn't read",
    ),
    "pictures in a list": (
        qa(frames=["1.jpg"]),
        r"the key frames names '1\.jpg', which isn't read; columns: \{image: frames\}",
    ),
    "pictures in an object": (qa(meta={"source": {"file": "1.jpg"}}), "the key meta names '1.jpg'"),
    "a picture by its number": (
        qa(image_id=42),
        r"the key image_id tells of a picture \('42'\), and the row names none",
    ),
    "a picture by its id": (chat("q", id="coco/1.jpg"), r"the key id names 'coco/1\.jpg', which isn't read"),
    "base64": (qa(scan="/9j/" + "A" * 1000), "the key scan names '/9j/AAAA"),
    "messages of text": ({"messages": "hi"}, "messages must be a list, not a text"),
    "bytes": (qa(thumbnail=ImageBytes(b"x", "y")), "the key thumbnail holds a picture or bytes"),
    "a data URL": (qa(scan="data:image/png;base64,AAAA"), "the key scan names 'data:image/png"),
    "two keys of pictures": (
        qa(image="1.jpg", image_path="2.jpg"),
        "the keys image and image_path name different pictures",
    ),
    "tools": (chat("q", tools=[{"name": "f"}]), "the key tools: calls of tools aren't learned"),
    "tools as text": (talk("q", tools='[{"name": "f"}]'), "the key tools: calls of tools aren't learned"),
    "tool calls": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            ]
        },
        "message 2: the key tool_calls: calls of tools aren't learned",
    ),
    "thoughts": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "reasoning_content": "hm"},
            ]
        },
        "message 2: the key reasoning_content: thoughts are learned as part of an answer's text",
    ),
    "thoughts of a row": (qa(reasoning_content="hm"), "the key reasoning_content: thoughts are learned"),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "the key chosen: this is a preference row"),
    "preferences of messages": (
        chat("q", rejected_response="b"),
        "the key rejected_response: this is a preference row",
    ),
    "unpaired preferences": (
        {"prompt": "q", "completion": "a", "label": False},
        "the key label: it says whether the answer is a good one",
    ),
    "a part's weight": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]},
        r"message 2: weight must be 0 \(not learned\) or 1, got '0\.5'",
    ),
    "a mark beside the image part that shows it": (
        chat([{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "<image>\nq"}]),
        "an <image> in the text beside image parts: leave one of both out",
    ),
    "a user's weight": (
        {"messages": [{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}]},
        "message 1: weight 1 of a user turn: only what assistants say is learned",
    ),
    "a row's weight": (qa(weight=0.5), "the key weight: rows can't weigh more or less than others"),
    "a system text of a document": (
        {"texts": ["t", None], "images": [None, "1.jpg"], "system": "s"},
        "the key system: a system text belongs to a chat",
    ),
    "two system texts": (
        {"messages": [{"role": "system", "content": "s"}, *chat("q")["messages"]], "system": "t"},
        "two system texts",
    ),
    "LLaVA's question files": (
        {"question_id": 1, "image": "1.jpg", "text": "q", "category": "conv"},
        "text beside question_id is a question without an answer",
    ),
    "a caption and a class": (
        {"image": "1.jpg", "text": "a cat", "label": "cat"},
        "may be question and answer, or a caption",
    ),
    "a question with a caption alone": (
        {"question": "q", "caption": "c", "image": "1.jpg"},
        "a question without an answer",
    ),
    "fewer marks": (
        chat("<image>q", images=["1.jpg", "2.jpg"]),
        r"1 image placeholders, but 2 images: '<image>q' with '1\.jpg, ",
    ),
    "more marks": (
        qa(question="<image><image>q", image="1.jpg"),
        "2 image placeholders, but 1 images: '<image><image>q' with",
    ),
    "a mark and no image": (chat("<image>\nq"), "an <image> in the text, but no picture is named in the row: '<image>"),
    "a mark of a question and no image": (qa(question="q\n<image>"), "an <image> in the text, but no picture is named"),
    "an index too high": (chat([{"type": "image", "index": 1}], images=["1.jpg"]), "asks for image 2 of 1"),
    "an image that no index shows": (
        chat([{"type": "image", "index": 0}, {"type": "text", "text": "q"}], images=["1.jpg", "2.jpg"]),
        "image 2 has no placeholder",
    ),
    "indices of some": (
        chat([{"type": "image", "index": 0}, {"type": "image"}], images=["1.jpg", "2.jpg"]),
        "some image placeholders have numbers",
    ),
    "an image of the web": (
        chat([{"type": "image_url", "image_url": {"url": "https://x.org/1.jpg"}}]),
        "is an address; pictures aren't fetched",
    ),
    "a part that holds a video beside": (
        chat([{"type": "text", "text": "q", "video": "1.mp4"}]),
        r"the key video names '1\.mp4', which isn't read",
    ),
    "Qwen-VL outside": (chat("<img>../secret.jpg</img>q"), "lies outside the image folder"),
    "an image of an assistant's turn": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "image": "1.jpg"}]},
        "message 2: an image in an assistant message",
    ),
    "a question of an object": (qa(question={"text": "q"}), r"question must be a text, not an object: "),
    "history of another shape": (
        {"query": "q", "response": "a", "history": ["h"]},
        "history 0 must be a question and its answer",
    ),
    "the_cauldron: no answer": (
        {"images": ["1.jpg"], "texts": [{"user": "q"}]},
        "texts 0 needs texts for user and assistant, got ",
    ),
    "choices and an answer that is none": (qa(choices=["x", "y"], answer="z"), "the answer 'z' is none of the choices"),
    "choices and an answer that may be two": (
        qa(choices=["1", "2", "3"], answer=2),
        "the answer '2' may be B, C of the choices, by its words or its place",
    ),
    "one choice": (
        qa(choices=["x"], answer=0),
        "choices must be a list of 2 to 26 texts, not of 1; columns: {ignore: choices} leaves it out",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_of_which_something_would_be_lost_is_refused_by_the_key(root: Path, kind: str) -> None:
    row, complaint = BAD[kind]
    with pytest.raises(UserError, match=f"^rows:3: .*{complaint}"):
        read_row(row, "rows:3", root)


@pytest.mark.parametrize(
    "empty",
    [
        {"video": None},
        {"videos": []},
        {"tools": "[]"},
        {"tools": []},
        {"audio": ""},
        {"weight": 1},
        {"system": ""},
        {"chosen": None},
        {"history": []},
        {"choices": None},
        {"reasoning_content": ""},
        {"videos": [None]},
    ],
)
def test_keys_that_hold_nothing_lose_nothing(root: Path, empty: dict[str, Any]) -> None:
    record = read_row({**qa(image="1.jpg"), **empty}, "rows:3", root)
    assert record == read_row(qa(image="1.jpg"), "rows:3", root)


def test_keys_that_nothing_is_read_from_are_noted(root: Path) -> None:
    row = {"id": 7, "source": "web", "image": "1.jpg", "image_id": "x.jpg", "width": 4, **qa(caption="c"), "gone": None}
    assert set(read_row(row, "rows:3", root).ignored) == {"id", "source", "image_id", "width", "caption"}
    assert set(read_row(qa(user="bob"), "rows:3", root).ignored) == {"user"}
    assert set(read_row({"image": "1.jpg", "caption": "c", "user": "bob", "label": True}, "", root).ignored) == {
        "user",
        "label",
    }
    row = qa(answers=["a"], solution="s", objects={"bbox": []}, prompt="p", image="1.jpg", label=3)
    assert set(read_row(row, "rows:3", root).ignored) == {"answers", "solution", "objects", "prompt", "label"}
    row = chat([{"type": "image", "image": "1.jpg", "max_pixels": 9}, {"type": "text", "text": "q"}])
    row["messages"][1]["name"] = "bob"
    row |= {"image_url": "http://a/b.jpg"}
    assert set(read_row(row, "rows:3", root).ignored) == {"max_pixels of a part", "name of a turn", "image_url"}


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", ""])
def test_a_picture_may_be_base64(root: Path, prefix: str) -> None:
    text = prefix + base64.b64encode(png() + bytes(100) * (not prefix)).decode()
    for row in (
        qa(image=text),
        chat([{"type": "image_url", "image_url": {"url": text}}, {"type": "text", "text": "q"}]),
    ):
        (image,) = read_row(row, "rows:3", root).images
        assert isinstance(image, ImageBytes)
        assert image.data.startswith(png())


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,%%%", "data:text/plain;base64,AAAA", "data:image/png,x", "data:"]
)
def test_a_data_url_that_is_none_is_refused(root: Path, url: str) -> None:
    with pytest.raises(UserError, match=r"^rows:3: .*(base64|data URL)"):
        read_row(qa(image=url), "rows:3", root)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("images/1.jpg", "1.jpg"),
        ("data/images/sub/4.jpg", "sub/4.jpg"),
        ("sub\\4.jpg", "sub/4.jpg"),
        ("SUB/4.JPG", "sub/4.jpg"),
        ("1.png", "1.jpg"),
        ("/data/sub/4.jpg", "sub/4.jpg"),
        ("file:///elsewhere/1.jpg", "1.jpg"),
    ],
)
def test_the_error_of_a_picture_names_the_file_that_is_there(root: Path, name: str, there: str) -> None:
    with pytest.raises(UserError, match=rf"^rows:3: image .*\(there is '{there}'\)$"):
        read_row(qa(image=name), "rows:3", root)


def test_a_file_url_of_the_folder_is_read_and_one_elsewhere_is_not(root: Path) -> None:
    (image,) = read_row(qa(image=f"file://{root}/sub/4.jpg"), "rows:3", root).images
    assert image == (root / "sub" / "4.jpg").resolve()
    with pytest.raises(UserError, match="lies outside the image folder"):
        read_row(qa(image="file:///etc/passwd"), "rows:3", root)


@pytest.mark.parametrize("key", ["question", "tools", "answer", "image", "choices", "history", "system"])
@pytest.mark.parametrize("depth", [50, 940, 100_000])
def test_whatever_is_nested_deeply_is_one_error(root: Path, key: str, depth: int) -> None:
    nested: Any = "1.jpg"
    for _ in range(depth):
        nested = [nested]
    row = {"question": "q", "answer": "a", "image": "1.jpg"}
    with pytest.raises(UserError, match=r"^rows:3: ") as error:
        read_row({**row, key: nested}, "rows:3", root)
    assert len(str(error.value)) < 1000
    assert set(read_row({**row, "odd": nested}, "rows:3", root).ignored) == {"odd"}
