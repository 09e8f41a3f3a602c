"""Hostile rows, images and models through `vlm data check`: each is listed with file and line, or is sound."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.check import check_source
from data.check_figures import as_json
from data.check_model import ModelSpec
from data.sources import open_source
from tests.conftest import TinyModels
from vlm import UserError

GOOD = {"image": "a.png", "question": "what?", "answer": "a cat"}


def turns(*roles: str, mark: bool = False) -> list[dict[str, str]]:
    return [
        {"from": role, "value": "<image>\nso" if mark and not number else "so"} for number, role in enumerate(roles)
    ]


def llava(*roles: str, mark: bool = False, **more: Any) -> dict[str, Any]:
    return {"conversations": turns(*roles, mark=mark), **more}


# what is in a line, and a part of what is said of it; nothing where the row is sound
ROWS: list[tuple[Any, str]] = [
    (GOOD, ""),
    ({**GOOD, "image": "gone.png"}, "is not in"),
    ({**GOOD, "image": "folder"}, "is not in"),
    ({**GOOD, "image": "../secret.png"}, "lies outside"),
    ({**GOOD, "image": "ROOT/secret.png"}, "lies outside"),
    ({**GOOD, "image": "link.png"}, "lies outside"),
    ({**GOOD, "image": "inside.png"}, ""),
    ({**GOOD, "image": "circle.png"}, "image 'circle.png'"),
    ({**GOOD, "image": "a\0.png"}, "can't be the name"),
    ({**GOOD, "image": 7}, "image"),
    ({**GOOD, "image": "empty.png"}, "empty file"),
    ({**GOOD, "answer": {"a": 7}}, "answer must be a text, not an object"),
    ({**GOOD, "answer": 7}, ""),
    ({**GOOD, "answer": ""}, "empty answer"),
    ({**GOOD, "answer": "word " * 200_000}, ""),
    ({**GOOD, "answer": "half \ud800"}, "surrogate"),
    ({**GOOD, "id": 1}, ""),
    ({**GOOD, "id": 1, "question": "again?"}, ""),
    (llava("human", "gpt", image="a.png", mark=True), ""),
    (llava("human", "gpt", image="a.png"), "0 image placeholders, but 1 images"),
    (llava("human", "gpt", mark=True), "1 image placeholders, but 0 images"),
    (llava("gpt", "human"), "is from 'assistant'"),
    (llava("human", "human", "gpt"), "is from 'user'"),
    (llava("human", "gpt", "human"), "doesn't end"),
    (llava("human", "system", "gpt"), "is from 'system'"),
    (llava("human", "robot"), "turn 2"),
    ({"conversations": {}}, "must be a list"),
    ({"messages": [7]}, "message 1"),
    ({"messages": []}, "no messages"),
    ([], "an object"),
    (None, "an object"),
    ('{"question": "cut', "not valid JSON"),
    ("\x00", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("1" * 10_000, " "),  # a number, or too many digits for one
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "folder").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(images / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "inside.png").symlink_to(images / "a.png")
    (images / "circle.png").symlink_to(images / "circle.png")
    (images / "empty.png").touch()
    return tmp_path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_kind_of_broken_row_is_listed(folder: Path, ending: str) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in ROWS]
    path = folder / "rows.jsonl"
    text = ending.join(lines).replace("ROOT", str(folder))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    told = as_json(check_source(open_source(path), decode_all=True, workers=0))
    listed = {bad["where"]: bad["reason"] for bad in told["bad_rows"]}
    assert told["rows"] == len(ROWS) == told["good"] + len(listed)
    for number, (line, complaint) in enumerate(ROWS, start=1):
        reason = listed.get(f"{path}:{number}", "")
        assert complaint in reason, (number, line)
        assert bool(reason) == bool(complaint), (number, line, reason)
    assert told["duplicates"]["same_ids"] == 1


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


PICTURE = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
FRAMES = [PICTURE, PICTURE.rotate(90)]
SOUND = {
    "grey16.png": encoded(Image.new("I;16", (9, 7), 4000), "PNG"),
    "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "palette.png": encoded(PICTURE.quantize(7), "PNG", transparency=0),
    "bits.png": encoded(PICTURE.convert("1"), "PNG"),
    "alpha.png": encoded(PICTURE.convert("LA"), "PNG"),
    "progressive.jpg": encoded(PICTURE, "JPEG", progressive=True),
    "animated.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated.webp": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "animated.png": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "wide.png": encoded(Image.new("L", (60_000, 1)), "PNG"),
    "tall.png": encoded(Image.new("L", (1, 60_000)), "PNG"),
    "dot.bmp": encoded(Image.new("RGB", (1, 1)), "BMP"),
    "lies.jpg": encoded(PICTURE, "PNG"),
    "trailing.png": encoded(PICTURE, "PNG") + b"<script>" * 100,
    **{f"turned{turn}.jpg": encoded(PICTURE, "JPEG", exif=exif(turn)) for turn in range(1, 9)},
}
BROKEN = {
    "cut.jpg": encoded(PICTURE, "JPEG")[:-60],
    "bomb.gif": b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "many.png": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    "none.gif": b"GIF89a\x00\x00\x00\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff;",
    "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "page.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def test_odd_images_are_sound_and_hostile_ones_are_listed(folder: Path) -> None:
    for name, data in {**SOUND, **BROKEN}.items():
        (folder / "images" / name).write_bytes(data)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "image": name}) + "\n" for name in (*SOUND, *BROKEN)))
    told = as_json(check_source(open_source(path), decode_all=True, workers=0))
    listed = {bad["where"]: bad["reason"] for bad in told["bad_rows"]}
    first = len(SOUND) + 1
    assert list(listed) == [f"{path}:{number}" for number in range(first, first + len(BROKEN))], listed
    for name, reason in zip(BROKEN, listed.values(), strict=True):
        assert name in reason


def test_turned_images_have_the_size_they_are_shown_with(folder: Path) -> None:
    for turn in (1, 6):
        (folder / "images" / f"{turn}.jpg").write_bytes(SOUND[f"turned{turn}.jpg"])
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "image": f"{turn}.jpg"}) + "\n" for turn in (1, 6)))
    headers = check_source(open_source(path), workers=0).table.headers
    assert sorted(zip(headers["height"].tolist(), headers["width"].tolist(), strict=True)) == [(16, 24), (24, 16)]


def test_a_model_that_brings_code_or_another_kind_of_model_is_refused(folder: Path, tiny_models: TinyModels) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(GOOD))
    config = json.loads((tiny_models("early", "mlp") / "config.json").read_text())
    (folder / "model").mkdir()
    for settings, complaint in (
        ({**config, "auto_map": {"AutoModel": "evil.Model"}}, "asks to run code"),
        ({"model_type": "llava"}, "vlm import makes one of ours"),
        ({"model_type": "none such"}, "cannot be loaded"),
        (config, "cannot be loaded"),
    ):
        (folder / "model" / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=complaint) as error:
            check_source(open_source(path), ModelSpec(str(folder / "model")), workers=0)
        assert "\n" not in str(error.value)
