"""`vlm data show`: a row as the model sees it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.text import Text

from data.check_model import ModelSpec, Reader
from data.show import COLUMNS, _texts, _tokens, draw_picture, printable, unnormalised
from data.sources import open_source
from tests.conftest import IMAGE_SIZE, TinyModels
from tests.processors import plain_processor
from vlm.cli import main

TURNS = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "<image>\nwhat is <|end|>?"},
    {"from": "gpt", "value": "a \x1b[31mcat"},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :20] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:-30])
    path = tmp_path / "rows.jsonl"
    lines = [
        {"image": "0.png", "conversations": TURNS},
        {"image": "gone.png", "conversations": TURNS},
        {"image": "cut.png", "conversations": TURNS},
        {"image": "0.png", "captions": ["a thing", "two things"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def styles(text: Text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_tokens_are_coloured_by_role_and_underlined_where_learned(rows: Path, tiny_models: TinyModels) -> None:
    reader = Reader(ModelSpec(str(tiny_models("early", "mlp"))))
    text = _tokens(open_source(rows)[0], reader)
    assert styles(text) == [
        ("<|system|>", "dim"),
        ("be brief", "magenta"),
        ("<|user|>", "dim"),
        ("[<image> x 16]", "bold yellow"),
        ("what is <|end|>?", "cyan"),
        ("<|assistant|>", "dim"),
        ("a \\x1b[31mcat", "green underline"),
        ("<|end|>", "dim underline"),
    ]
    assert text.plain.startswith(f"{len(reader.chat.encode(list(open_source(rows)[0].messages), [16]).input_ids)} tok")


def test_an_answer_that_weighs_nothing_is_not_underlined(rows: Path, tiny_models: TinyModels) -> None:
    path = rows.parent / "weights.jsonl"
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "one", "weight": 0}]
    path.write_text(json.dumps({"conversations": [*said, *({**turn, "weight": None} for turn in said)]}))
    record = open_source(path)[0]
    reader = Reader(ModelSpec(str(tiny_models("early", "mlp"))))
    for text in (_texts(record), _tokens(record, reader)):
        assert [style for words, style in styles(text) if words == "one"] == ["green", "green underline"]


def test_a_document_is_shown_without_a_template(rows: Path, tiny_models: TinyModels) -> None:
    path = rows.parent / "documents.jsonl"
    path.write_text(json.dumps({"images": ["0.png", None], "texts": [None, "a cat"]}))
    reader = Reader(ModelSpec(str(tiny_models("early", "mlp"))))
    expected = [("[<image> x 16]", "bold yellow"), ("a cat", "green underline"), ("<|end|>", "dim underline")]
    assert styles(_tokens(open_source(path)[0], reader)) == expected
    assert styles(_texts(open_source(path)[0])) == [
        ("document: ", "bold green"),
        ("<image>", "bold yellow"),
        ("a cat", "green underline"),
    ]


def test_the_command_prints_a_row(
    rows: Path, tiny_models: TinyModels, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["data", "show", str(rows), "0"]) == 0
    out = capsys.readouterr().out
    assert f"{rows}:1, llava" in out
    assert "system: be brief\nuser: <image>what is <|end|>?\nassistant: a \\x1b[31mcat\n" in out
    assert "▀" not in out
    model = str(tiny_models("early", "mlp"))
    assert main(["data", "show", str(rows), "0", "--model", model, "--draw", "--save", str(tmp_path / "seen")]) == 0
    out = capsys.readouterr().out
    assert "[<image> x 16]" in out
    assert "▀" in out
    saved = Image.open(tmp_path / "seen" / "row0-0.png")
    assert saved.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert main(["data", "show", str(rows), "3"]) == 0
    assert "two things" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        ("1", "rows.jsonl:2: image 'gone.png' is not in"),
        ("2", "rows.jsonl:3: "),
        ("4", "has rows 0 to 3, and no row 4"),
    ],
)
def test_a_row_that_cant_be_shown_is_one_sentence(
    rows: Path, number: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", str(rows), number]) == 1
    told = capsys.readouterr()
    assert complaint in told.err
    assert told.out == ""


def test_saved_pictures_are_what_the_encoder_gets(tiny_tokenizer: object) -> None:
    processor = plain_processor(tiny_tokenizer, 3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 48))
    (seen,) = unnormalised(processor, [picture])
    scaled = picture.resize((42, 32), Image.Resampling.BICUBIC)
    wanted = np.asarray(scaled.crop((5, 0, 37, 32)), dtype=int)
    assert seen.size == (32, 32)
    assert np.abs(np.asarray(seen, dtype=int) - wanted).max() <= 1


def test_half_blocks_hold_the_picture() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[1, 2] = (10, 200, 30)
    text = draw_picture(Image.fromarray(pixels), columns=4)
    assert text.plain == "▀▀▀▀\n▀▀▀▀\n"
    assert [str(span.style) for span in text.spans[:4]].index("#000000 on #0ac81e") == 2
    tall = draw_picture(Image.new("RGB", (1, 60000)))
    assert len(tall.plain.splitlines()) == COLUMNS
    wide = draw_picture(Image.new("RGB", (60000, 1)))
    assert len(wide.plain.splitlines()) == 1


def test_what_would_move_the_cursor_is_written_out() -> None:
    assert printable("a\tb\x1b[0m\u202e\nc é 🧊") == "a\\tb\\x1b[0m\\u202e\nc é 🧊"
