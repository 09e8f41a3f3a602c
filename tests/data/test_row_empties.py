"""Columns that hold nothing, as tables of many kinds of rows have them: a row is what it is without them."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.formats import CAPTION_PROMPT, read_row, row_format
from data.sources import open_source
from tests.data.row_kinds import chat, qa, said, talk
from vlm import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.jpg")
    return folder


PLAIN = ["user: q", "assistant: a"]
SHOWN = ["user: [0]q", "assistant: a"]
CAPTION = [f"user: [0]{CAPTION_PROMPT}", "assistant: c"]
NAN = float("nan")
EMPTY: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    **{
        f"a picture that is {value!r}": (qa(image=value), "qa", PLAIN)
        for value in ("", {}, NAN, False, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, [""], [None], [[]])
    },
    "pictures of a chat": (chat("q", images=[""]), "messages", PLAIN),
    "a second key of pictures": ({"image": "1.jpg", "png": "", **qa()}, "qa", SHOWN),
    "texts of a question": (qa(texts=[], image="1.jpg"), "qa", SHOWN),
    "turns of a question": (qa(conversation=[]), "qa", PLAIN),
    "messages of a question": (qa(messages=[], image="1.jpg"), "qa", SHOWN),
    "messages of LLaVA's": (talk("<image>\nq", messages="", image="1.jpg"), "llava", SHOWN),
    "an instruction of a caption": ({"image": "1.jpg", "caption": "c", "instruction": ""}, "captions", CAPTION),
    "a question of a caption": ({"image": "1.jpg", "caption": "c", "question": NAN}, "captions", CAPTION),
    "answers of a caption": ({"image": "1.jpg", "text": "c", "answers": []}, "captions", CAPTION),
    "captions beside a text": ({"image": "1.jpg", "captions": [], "text": "c"}, "captions", CAPTION),
    "FineVision without a picture": ({"images": None, "texts": [{"user": "q", "assistant": "a"}]}, "turns", PLAIN),
    "FineVision with a list of none": ({"images": [], "texts": [{"user": "q", "assistant": "a"}]}, "turns", PLAIN),
    "a document of text alone": ({"images": [None], "texts": ["t"]}, "documents", ["document: t"]),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_column_that_holds_nothing_is_as_if_it_were_not_there(root: Path, kind: str) -> None:
    row, name, messages = EMPTY[kind]
    assert row_format(row) == name
    assert said(row, root)[0] == messages
    assert read_row(row, "rows:3", root).ignored == ()


@pytest.mark.parametrize("row", [qa(answer=""), qa(answer="  ", image=""), {"question": "q", "answers": []}])
def test_an_answer_that_holds_nothing_is_an_error(root: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^rows:3: (message 2: an empty answer|a question without an answer)"):
        read_row(row, "rows:3", root)


def test_empty_pictures_of_parquet_are_none(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = {"bytes": (root / "1.jpg").read_bytes(), "path": None}
    rows = [qa(image=held), qa(image={"bytes": b"", "path": ""})]
    datasets.Dataset.from_list(rows).to_parquet(root / "rows.parquet")
    assert [len(record.images) for record in open_source(root / "rows.parquet")] == [1, 0]
