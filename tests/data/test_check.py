"""`vlm data check`: every broken row is named once, figures agree with counts made by hand, nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.check import Findings, check_source
from data.check_figures import as_json, histogram, lengths, packing_fill
from data.check_model import ModelSpec
from data.check_page import write_page
from data.sources import open_source
from tests.conftest import TinyModels
from vlm import UserError
from vlm.cli import main


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path)


def row(image: str | None = None, question: str = "what is it?", answer: str = "a cat", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **({"image": image} if image else {}), **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png", number)
    return tmp_path


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in rows))
    return path


def check(path: Path, *more: Any, **options: Any) -> Findings:
    return check_source(open_source(path), *more, workers=0, **options)


def test_every_broken_row_is_listed_once_with_its_line_and_the_rest_is_good(folder: Path) -> None:
    images = folder / "images"
    picture(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-200])
    (images / "text.png").write_text("hello")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    whole = (images / "0.png").read_bytes()
    (images / "bomb.png").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    rows: list[tuple[Any, str]] = [
        (row("0.png"), ""),
        ('{"question": ', "not valid JSON"),
        (row("cut.jpg"), "broken image"),
        (row("text.png"), "not an image of a known format"),
        (row("missing.png"), "is not in"),
        (row("../rows.jsonl"), "lies outside"),
        (row("bomb.png"), "too many pixels"),
        (row(answer=" "), "an empty answer"),
        ([1], "a row is an object"),
        (row(), ""),
        (row("cut.jpg", "again?"), "broken image"),
    ]
    findings = check(write(folder, [line for line, _ in rows]), decode_all=True)
    told = as_json(findings)
    wrong = {number: reason for number, (_, reason) in enumerate(rows, start=1) if reason}
    assert [bad["where"] for bad in told["bad_rows"]] == [f"{folder}/rows.jsonl:{number}" for number in wrong]
    for bad, reason in zip(told["bad_rows"], wrong.values(), strict=True):
        assert reason in bad["reason"]
        assert "rows.jsonl:" not in bad["reason"]
    assert (told["rows"], told["good"]) == (len(rows), 2)
    assert sum(told["reasons"].values()) == len(wrong)
    assert told["images"] == {"shown": 1, "files": 4, "decoded": 2, "bad": 3}


def test_only_a_sample_is_decoded_unless_all_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.check.SAMPLE", 3)
    path = write(folder, [row(f"{number}.png", f"{number}?") for number in range(6)])
    assert as_json(check(path))["images"]["decoded"] == 3
    assert as_json(check(path, decode_all=True))["images"]["decoded"] == 6


def test_processes_find_what_this_one_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.check.CHUNK", 3)
    monkeypatch.setattr("data.check.FEW", 2)
    rows = [row(f"{number % 6}.png", f"{number % 9}?", id=number % 11) for number in range(20)]
    path = write(folder, [*rows, row("gone.png"), "[", *rows[:3]])
    alone = as_json(check(path, decode_all=True))
    assert as_json(check_source(open_source(path), decode_all=True, workers=2)) == alone
    assert (alone["rows"], alone["good"]) == (25, 23)


def test_duplicates_are_warnings(folder: Path) -> None:
    images = folder / "images"
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    rows = [
        row("0.png", id="a"),
        row("1.png", id=1),
        row("0.png", id="b"),
        row("copy.png", id="1"),
        row("0.png", answer="a dog", id="a"),
    ]
    findings = check(write(folder, rows))
    assert findings.table.bad == []
    where = [f"{folder}/rows.jsonl:{number}" for number in range(1, 6)]
    assert findings.same_rows == [[where[0], where[2]]]
    assert findings.same_ids == [[where[0], where[4]]]
    assert [[image.name for image in group] for group in findings.same_images] == [
        [str(images / "0.png"), str(images / "copy.png")]
    ]
    assert findings.counts == {"same_rows": 1, "same_ids": 1, "same_images": 1}


def test_big_files_of_one_size_are_compared_whole(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "a.bmp")
    noise[0, 0] ^= 1  # the last line in the file
    Image.fromarray(noise).save(folder / "images" / "b.bmp")
    (folder / "images" / "c.bmp").write_bytes((folder / "images" / "a.bmp").read_bytes())
    findings = check(write(folder, [row(f"{name}.bmp") for name in "abc"]))
    assert [[Path(image.name).name for image in group] for group in findings.same_images] == [["a.bmp", "c.bmp"]]


def test_rows_and_look_alikes_of_an_evaluation_are_found(folder: Path) -> None:
    images = folder / "images"
    smaller = Image.open(images / "2.png").resize((20, 22))
    smaller.convert("RGB").save(images / "small.jpg", quality=60)
    picture(images / "new.png", 77)
    train = write(folder, [row(f"{number}.png", f"{number}?") for number in range(6)])
    held = write(folder, [row("small.jpg", "x?"), row("new.png", "y?"), row("1.png", "1?"), "{"], "held.jsonl")
    findings = check(train, against=[open_source(held)])
    (compared,) = findings.compared
    assert (compared.rows, compared.bad, compared.same_rows, compared.alike) == (4, 1, 1, 2)
    pairs = {(Path(pair.ours.name).name, Path(pair.theirs.name).name) for pair in compared.image_pairs}
    assert pairs == {("2.png", "small.jpg"), ("1.png", "1.png")}
    assert compared.row_pairs == [(f"{train}:2", f"{held}:3")]
    assert findings.table.bad == []


def test_tokens_are_those_of_training(folder: Path, tiny_models: TinyModels) -> None:
    spec = ModelSpec(str(tiny_models("early", "perceiver")), context=60)
    turns = [{"from": role, "value": "hello there"} for _ in range(8) for role in ("human", "gpt")]
    rows = [
        row("0.png"),
        {"conversations": turns},
        row(answer="cube " * 400),
        row(question="a\u00e9?"),
    ]
    findings = check(write(folder, rows), spec)
    told = lengths(findings)
    assert told is not None
    assert (told.context, told.shortened, told.too_long) == (60, 1, 1)
    assert told.dropped_messages % 2 == 0
    assert 0 < told.dropped_messages < 16
    (bad,) = findings.table.bad
    assert bad.where.endswith("rows.jsonl:3")
    assert "don't fit the context of 60" in bad.reason
    from vlm.processing import VisionLanguageProcessor

    processor = VisionLanguageProcessor.from_pretrained(spec.model)
    for number, images in ((0, [4]), (1, [])):
        messages = list(open_source(folder / "rows.jsonl")[number].messages)
        tokens = processor.chat.encode(messages, images)
        assert findings.table.rows["tokens"][number] == len(tokens.input_ids)
    first = findings.table.rows[0]
    assert first["kept"] == first["tokens"]
    assert first["supervised"] == len(processor.chat.encode_text("a cat")) + 1
    assert findings.table.rows["kept"][1] <= 60 < findings.table.rows["tokens"][1]
    assert told.fill is not None
    assert check(folder / "rows.jsonl", ModelSpec(spec.model)).context == 512


def test_a_language_model_is_read_as_what_it_is_to_become(folder: Path, tiny_tokenizer: Any) -> None:
    from transformers import LlamaConfig

    model = folder / "lm"
    LlamaConfig(max_position_embeddings=300).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    path = write(folder, [row("0.png"), row()])
    findings = check(path, ModelSpec(str(model), image_tokens=200))
    assert (findings.context, findings.image_tokens) == (300, 200)
    with_image, without = findings.table.rows["tokens"].tolist()
    assert with_image == without + 200
    assert len(check(path, ModelSpec(str(model))).table.bad) == 1  # 576 tokens for an image


def test_a_model_that_cant_be_read_is_one_sentence(folder: Path) -> None:
    path = write(folder, [row()])
    with pytest.raises(UserError, match="no such model folder"):
        check(path, ModelSpec(str(folder / "nothing")))
    with pytest.raises(UserError, match="not a model folder"):
        check(path, ModelSpec(str(folder)))


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
        code = main(["data", "check", *words, "--workers", "0"])
        return code, capsys.readouterr().out

    def test_the_exit_code_goes_by_the_share(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = str(write(folder, [*[row(question=f"{number}") for number in range(199)], "{"]))
        assert self.run(capsys, path)[0] == 1
        assert self.run(capsys, path, "--max-bad", "0.5%")[0] == 0
        assert self.run(capsys, path, "--max-bad", "0.004")[0] == 1
        assert self.run(capsys, str(write(folder, [row()], "good.jsonl")))[0] == 0
        for wrong in ("2", "-1%", "nan", "x"):
            with pytest.raises(SystemExit):
                self.run(capsys, path, f"--max-bad={wrong}")

    def test_json_is_all_of_stdout(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [row("0.png"), "{", row("gone.png")]
        path = write(folder, rows)
        code, out = self.run(capsys, str(path), "--json")
        told = json.loads(out)
        assert (code, told["rows"], told["good"]) == (1, 3, 1)
        assert [bad["where"] for bad in told["bad_rows"]] == [f"{path}:2", f"{path}:3"]
        write(folder, rows[:1], "array.json").write_text(json.dumps([rows[2], rows[0]]))
        told = json.loads(self.run(capsys, str(folder / "array.json"), "--json")[1])
        assert [bad["where"] for bad in told["bad_rows"]] == [f"{folder}/array.json[0]"]

    def test_the_report_names_what_is_wrong(
        self, folder: Path, capsys: pytest.CaptureFixture[str], tiny_models: TinyModels
    ) -> None:
        path = write(folder, [row("0.png"), row("0.png"), row("gone.png"), row(question="[bold]no markup[/]")])
        model = str(tiny_models("early", "mlp"))
        code, out = self.run(capsys, str(path), "--model", model, "--report", str(folder / "out" / "page.html"))
        assert code == 1
        for words in ("1 broken (25.00%)", f"{path}:3", "repeat an earlier", "supervised", "tokens per row", "% full"):
            assert words in out, words
        page = (folder / "out" / "page.html").read_text()
        assert f"{path}:3" in page
        assert "<svg" in page
        assert [path.name for path in (folder / "out").iterdir()] == ["page.html"]


def test_a_page_holds_thumbnails_and_nothing_to_download(folder: Path) -> None:
    (folder / "images" / "<b>.png").write_bytes((folder / "images" / "0.png").read_bytes())
    rows = [row("0.png"), row("<b>.png"), *[row("gone.png")] * 300]
    held = write(folder, [row("0.png")], "held.jsonl")
    write_page(check(write(folder, rows), against=[open_source(held)]), folder / "page.html")
    page = (folder / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 3
    assert "<b>.png" not in page
    assert "and 100 more" in page
    assert "http" not in page.replace("http-equiv", "")


@given(
    values=st.lists(st.integers(-5, 10**6) | st.floats(0.001, 1e4), min_size=1, max_size=60), most=st.integers(1, 25)
)
@settings(max_examples=200, deadline=None)
def test_histograms_count_everything(values: list[float], most: int) -> None:
    bars = histogram("x", np.array(values), most)
    assert sum(bars.counts) == len(values)
    assert len(bars.edges) == len(bars.counts) + 1 <= most + 1
    assert bars.edges == sorted(set(bars.edges))


def test_the_fill_is_that_of_packing() -> None:
    lengths = np.array([60, 50, 40, 30, 10, 10])
    assert packing_fill(lengths, np.zeros(6, int), 100) == (1.0, 2)
    assert packing_fill(lengths, np.full(6, 8), 100) == (pytest.approx(200 / 600), 6)  # 8 images in a row, no more
    many = np.random.default_rng(0).integers(1, 100, 5000)
    fill, packed = packing_fill(many, np.zeros(5000, int), 512)
    assert fill == pytest.approx(many.sum() / (512 * packed))
    assert fill > 0.97


# what files of rows may hold: sound rows, and everything else
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["0.png", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image", "role", "content", "from", "value"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
KEYS = ["messages", "conversations", "question", "answer", "image", "images", "caption", "captions", "id", "x"]
LINES = st.one_of(
    st.sampled_from([row("0.png"), row("1.png"), row()]).map(json.dumps).map(str.encode),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4).map(json.dumps).map(str.encode),
    VALUES.map(json.dumps).map(str.encode),
    st.sampled_from([row("0.png"), row("gone.png"), row("../x"), row("images")]).map(json.dumps).map(str.encode),
    st.binary(max_size=40).filter(lambda data: b"\n" not in data and b"\r" not in data and data.strip()),
    st.just(b"[" * 5000),
)


@given(lines=st.lists(LINES, min_size=1, max_size=8), ending=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_rows_are_good_or_listed(
    folder: Path, lines: list[bytes], ending: bytes, bom: bool
) -> None:
    path = folder / "fuzz.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + json.dumps(row()).encode() + ending + ending.join(lines))
    told = as_json(check(path))
    json.loads(json.dumps(told))
    assert told["rows"] == told["good"] + len(told["bad_rows"])
    assert told["rows"] == 1 + len(lines)
    numbers = [int(bad["where"].removeprefix(f"{path}:")) for bad in told["bad_rows"]]
    assert numbers == sorted(set(numbers))
    assert all(bad["reason"] for bad in told["bad_rows"])
    sound = {json.dumps(each).encode() for each in (row("0.png"), row("1.png"), row())}
    assert not {number for number, line in enumerate(lines, start=2) if line in sound} & set(numbers)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_images_of_any_bytes_are_good_or_make_their_rows_bad(folder: Path, data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    whole = bytearray((folder / "images" / "0.png").read_bytes())
    for _ in range(rng.randint(0, 4)):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    end = rng.choice([len(whole), rng.randrange(1, len(whole))])
    (folder / "images" / "broken.png").write_bytes(bytes(whole[:end]) + rng.choice([b"", b"trailing"]))
    told = as_json(check(write(folder, [row("broken.png"), row("1.png")]), decode_all=True))
    assert told["rows"] == told["good"] + len(told["bad_rows"]) == 2
    from vlm.images import read_image

    try:
        read_image(folder / "images" / "broken.png")
        assert told["bad_rows"] == []
    except UserError:
        assert [bad["where"] for bad in told["bad_rows"]] == [f"{folder}/rows.jsonl:1"]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.2, 1.0])  # seconds; a worker imports its modules at first
def test_ctrl_c_ends_it_and_its_workers(folder: Path, after: float) -> None:
    path = write(folder, [row(f"{number % 6}.png", f"{number}?") for number in range(150_000)])
    command = [sys.executable, "-m", "vlm.cli", "data", "check", str(path), "--workers", "2"]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background begins without
    )
    children: list[psutil.Process] = []
    until = time.monotonic() + 60
    while len(children) < 3 and time.monotonic() < until:  # two workers, and the tracker of their semaphores
        children = psutil.Process(started.pid).children(recursive=True)
        time.sleep(0.05)
    time.sleep(after)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    out, err = started.communicate(timeout=20)
    assert (started.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert b"interrupted" in err
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_an_array_that_breaks_off_is_one_broken_row_for_check_and_saved_by_convert(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "rows.json"
    path.write_text(json.dumps([row("0.png"), row(), row("1.png")])[:-9])
    assert main(["data", "check", str(path), "--json", "--workers", "0", "--max-bad", "90%"]) == 1
    out, err = capsys.readouterr()
    assert "rows.json: a run doesn't start with it" in err
    told = json.loads(out)
    assert (told["rows"], told["good"], [bad["where"] for bad in told["bad_rows"]]) == (3, 2, [f"{path}[2]"])
    assert told["bad_rows"][0]["reason"].startswith("not valid JSON (the file ends in the middle; was it cut off?)")
    convert = ["data", "convert", str(path), "--workers", "0", "--max-bad", "50%", "--out", str(folder / "saved.jsonl")]
    assert main(convert) == 0
    assert len(open_source(folder / "saved.jsonl")) == 2
    assert len((folder / "saved.quarantine.jsonl").read_text().splitlines()) == 1
