"""Whatever stands in a row or a file: a Record or one error that begins with where, soon, and every row once."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import image_files
from data.formats import ROW_FORMATS, read_row
from data.pictures import ImageBytes
from data.records import Record
from data.sources import FORMATS, Source, open_source
from vlm import UserError

DEPTH = int(os.environ.get("VLM_FUZZ_DEPTH", "1"))  # how many times more examples
NAMES = st.sampled_from(
    ["a.png", "sub/b.png", "../secret.png", "/etc/passwd", "sub", "", ".", "..", "out.png", "around/secret.png",
     "a.png/", "circle.png", "a\0.png", "\ud800", "x" * 300, "sub/../a.png", "//a.png", "~/a.png", "empty.png",
     "a.png/../a.png"]
)  # fmt: skip
TEXTS = st.sampled_from(
    [
        "what?",
        "",
        " ",
        "<image>",
        "a <image>\n<image> b",
        "\ud800",
        "\0",
        "ü",
        "user",
        "gpt",
        "human",
        "<image 1>",
        "<image 99999999999999999999>",
        "<img>a.png</img>q",
        "<img>../secret.png</img>",
        "<|image_0|>",
        "['a', 'b']",
        "B",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,ü",
        "file:///etc/passwd",
        "[[[",
        "yes",
        "nan",
    ]
)
KEYS = st.sampled_from(
    ["messages", "conversations", "image", "images", "caption", "captions", "question", "answer", "answers", "prompt",
     "texts", "text", "text_list", "image_info", "file_name", "role", "content", "type", "from", "value", "image_name",
     "matched_text_index", "id", "system", "assistant", "user", "index", "path", "url", "image_url", "bytes", "weight",
     "label", "history", "choices", "options", "A", "B", "tools", "video", "image_id", "query", "response", "input"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | NAMES | TEXTS
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "video"])}, optional={"text": TEXTS, "image": NAMES}
    )
    | ANYTHING,
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "bot"]), "content": TEXTS | PARTS | ANYTHING}
    )
    | ANYTHING,
    max_size=4,
)
TURNS = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "cat"]), "value": TEXTS | ANYTHING}),
    max_size=4,
)
LISTS = st.lists(NAMES | TEXTS | ANYTHING, max_size=3)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES,
        "conversations": TURNS,
        "image": NAMES | LISTS | ANYTHING,
        "images": LISTS,
        "caption": TEXTS | ANYTHING,
        "captions": LISTS,
        "question": TEXTS | ANYTHING,
        "answer": TEXTS | ANYTHING,
        "answers": LISTS,
        "texts": LISTS,
        "text_list": LISTS,
        "image_info": st.lists(
            st.fixed_dictionaries({"image_name": NAMES, "matched_text_index": st.integers(-2, 3)}) | ANYTHING,
            max_size=3,
        ),
        "prompt": TEXTS | ANYTHING,
        "file_name": NAMES,
        "text": TEXTS,
    },
)
OTHERS = st.dictionaries(KEYS, NAMES | TEXTS | LISTS | MESSAGES | ANYTHING, max_size=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "../secret.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "empty.png").touch()
    (folder / "out.png").symlink_to(outside / "secret.png")
    (folder / "around").symlink_to(outside)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    return folder


def tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, or the one kind of error that may come."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def check(record: Record, root: Path) -> None:
    """What every record promises."""
    parts = [part for message in record.messages for part in message["content"]]
    assert sum(part == {"type": "image"} for part in parts) == len(record.images)
    assert all(part == {"type": "image"} or (part["type"], type(part["text"])) == ("text", str) for part in parts)
    for image in record.images:
        if isinstance(image, ImageBytes):  # of a data URL
            continue
        assert isinstance(image, Path)
        assert image.resolve() == image
        assert image.is_relative_to(root.resolve())
        assert image.stat().st_size
    if record.kind == "chat":
        roles = [message["role"] for message in record.messages]
        assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
        assert all(
            "".join(p["text"] for p in m["content"]).strip() for m in record.messages if m["role"] == "assistant"
        )


@given(row=LIKELY | OTHERS | ANYTHING, format=st.sampled_from([None, None, *ROW_FORMATS]))
@settings(max_examples=500 * DEPTH, deadline=None)
def test_a_row_is_a_record_or_one_error(root: Path, row: Any, format: str | None) -> None:
    record, error = tried(lambda: read_row(row, "rows:3", root, format))
    if record is None:
        assert error.startswith("rows:3: ")
        assert len(error) < 1000
    else:
        check(record, root)


STEPS = st.lists(st.sampled_from(["a.png", "sub", "b.png", "..", ".", "", "around", "images", "out.png", "circle.png"]))


@given(steps=STEPS)
@settings(max_examples=300 * DEPTH, deadline=None)
def test_the_quick_look_at_an_image_finds_what_the_careful_one_does(root: Path, steps: list[str]) -> None:
    name = "/".join(steps) or "."
    careful, _ = tried(lambda: image_files._find_carefully("rows:3", name, root))
    assert tried(lambda: image_files.find_image("rows:3", name, root))[0] == careful
    try:
        quick = image_files._find_quickly(name, root)
    except (OSError, ValueError):
        quick = None
    assert quick in (None, careful)


def count(source: Source) -> int:
    """Reads everything; good and bad rows together are all of them."""
    good = bad = 0
    for index in range(len(source)):
        where = source.where(index)
        record, error = tried(lambda index=index: source[index])
        if record is None:
            assert error.startswith(f"{where}: ")
            bad += 1
        else:
            assert record.where == where
            good += 1
    assert good + bad == len(source)
    return len(source)


SEEDS = [
    b'{"question": "what?", "answer": "this", "image": "a.png"}\n{"caption": "a cube", "image": "sub/b.png"}\n',
    b'[{"question": "what?", "answer": "this"},\n {"conversations": [{"from": "human", "value": "<image>"}]}]',
    b'{"info": {}, "questions": [{"question_id": 1, "question": "q", "image_id": 1}], "annotations": []}',
    b'{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]}',
    b'{"images": [{"sentences": [{"raw": "x"}], "split": "train", "filename": "a.png"}], "dataset": "x"}',
    b'{"data": [{"question": "q", "image_id": "a", "answers": ["x"]}]}',
    b'{"1": {"imageId": "a", "question": "q", "answer": "x"}, "2": {}}',
    b'image,caption\na.png,"a ""cube"", red"\nsub/b.png,x\n',
    b"a.png#0\ta cube\na.png#1\tone cube\n",
    b"\xef\xbb\xbf\r\n \r\n",
    "[1]".encode("utf-16"),
]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "drop", "put", "twice"]),
        st.floats(0, 1),
        st.sampled_from([b"\0", b'"', b"[", b"]", b"{", b"}", b",", b"\n", b"\\", b"\xff", b"\xef\xbb\xbf", b"1e999",
                         b"#0\t", b"NaN", b"-", b'"a":', b"[" * 2000, b"9" * 5000, b"\r", b":", b"null"]),
    ),
    max_size=4,
)  # fmt: skip


def changed(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, piece in changes:
        at = int(share * len(content))
        content = {
            "cut": content[:at],
            "drop": content[:at] + content[at + 1 :],
            "put": content[:at] + piece + content[at:],
            "twice": content[:at] + content[at // 2 :],
        }[kind]
    return content


def open_and_count(path: Path, root: Path, format: str | None = None) -> None:
    source, error = tried(lambda: open_source(path, root, format))
    if source is None:
        assert error.startswith(str(path))
    else:
        assert count(source) > 0


@given(
    seed=st.sampled_from(SEEDS),
    changes=CHANGES,
    name=st.sampled_from(["x.json", "x.jsonl", "x.csv", "x.tsv", "x.txt", "x"]),
    format=st.sampled_from([None, None, None, *FORMATS]),
)
@settings(max_examples=300 * DEPTH, deadline=5000)
def test_a_file_is_rows_or_one_error(root: Path, seed: bytes, changes: Any, name: str, format: str | None) -> None:
    path = root.parent / name
    path.write_bytes(changed(seed, changes))
    open_and_count(path, root, format)


@given(row=LIKELY, end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=60 * DEPTH, deadline=5000)
def test_rows_of_files_are_the_same_in_lines_and_in_arrays(root: Path, row: Any, end: str) -> None:
    text = json.dumps(row)
    for name, content in (("y.jsonl", f"{text}{end}{text}{end}"), ("y.json", f"[{text},{end}{text}]")):
        (root.parent / name).write_bytes(content.encode())
        source = open_source(root.parent / name, root)
        assert count(source) == 2
        first, second = tried(lambda source=source: source[0])[0], tried(lambda source=source: source[1])[0]
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert (first.messages, first.images) == (second.messages, second.images)


def tar_of(names: list[str], contents: list[bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in zip(names, contents, strict=False):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


MEMBERS = st.sampled_from(
    ["a.png", "a.txt", "a.json", "b.0.jpg", "b.json", "../c.txt", "/d.jpg", "e", ".f", "g/", "a.PNG"]
)
CONTENTS = st.sampled_from(
    [
        b"",
        b"x",
        b"\xff",
        b'{"caption": "x"}',
        b'{"image": "a.png", "question": "q", "answer": "a"}',
        b"[" * 9999,
        b"[1]",
    ]
)


@given(names=st.lists(MEMBERS, max_size=5), contents=st.lists(CONTENTS, min_size=5, max_size=5), changes=CHANGES)
@settings(max_examples=150 * DEPTH, deadline=5000)
def test_a_tar_is_samples_or_one_error(root: Path, names: list[str], contents: list[bytes], changes: Any) -> None:
    path = root.parent / "x.tar"
    path.write_bytes(changed(tar_of(names, contents), changes))
    open_and_count(path, root)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tar", ".parquet", ".txt", ""])
@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_file_is_one_error(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    MAKERS[kind](path)
    with pytest.raises(UserError, match=f"^{path}: .*(no such data file|cannot be read)"):
        open_source(path)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="unknown format 'lava'; there are messages, llava, captions, qa, documents, turns, vqav2"
    ):
        open_source(tmp_path, format="lava")
