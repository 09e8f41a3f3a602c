"""README.md, typed line by line into one folder on what the line before left, each result looked at.

The folder has what README supposes: the configs, an environment to activate, thirty pictures of one's own, a few
questions in VQAv2's files, and a tiny LLaVA where the hub has a large one. A line without a check fails the test.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.data.benchmarks.files import annotation, write, write_lines
from tests.test_docs import ROOT, blocks
from tests.vlm.llavas import make_llava
from vlm import load

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS, IN_VQA = 30, 4  # the first are asked in VQAv2's files, too
ANSWERS = "red hat, grass, snow, blue boat, two dogs, street, bike, left one, tall man, nothing".split(", ")
SHORT = "\nAnswer the question using a single word or phrase."  # as vlm eval asks VQAv2's questions
QUESTIONS = ("What is in the picture?", "What do you see first?", "Who or what is there?")


class Line(NamedTuple):
    """A command of README, or a whole script of Python."""

    tag: str
    text: str


def lines(markdown: str) -> list[Line]:
    found: list[Line] = []
    for block in blocks(markdown):
        if block.tag.startswith("bash"):
            commands = re.sub(r"\\\n\s*", "", block.text).splitlines()
            found += [Line("bash", command) for command in commands if command.strip()]
        elif block.tag.startswith("python"):
            found.append(Line("python", block.text))
    return found


class Reader:
    """Somebody at a terminal in `folder` who types what README says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.activated = ""
        self.port = str(free_port())
        self.server: subprocess.Popen[str] | None = None
        own = str(Path(sys.executable).parent)
        path = [part for part in os.environ["PATH"].split(os.pathsep) if part != own]
        self.environment = {**os.environ, "PATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
        self.environment.pop("VIRTUAL_ENV", None)

    def type(self, command: str) -> str:
        """What a command prints; it must end well and show no traceback."""
        script = f"{self.activated}\n{command}"
        done = subprocess.run(
            ["bash", "-eu", "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def leave_running(self, command: str) -> None:
        """A command that goes on, in a terminal of its own."""
        script = f"{self.activated}\nexec {command}"
        self.server = subprocess.Popen(
            ["bash", "-eu", "-c", script], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )

    def stop_server(self) -> int:
        """Its exit code."""
        assert self.server is not None
        self.server.terminate()
        return self.server.wait(timeout=60)

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text(encoding="utf-8"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def make_demo(reader: Reader, line: str) -> None:
    """`make demo` installs, which the test environment is spared, and runs a demo, here a quick one."""
    told = subprocess.run(
        ["make", "-n", "-W", "setup.py", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    command = next(text for text in told.stdout.splitlines() if "vlm demo" in text).strip()
    assert ".[train,serve,eval]" in told.stdout
    reader.type(f"{command} --quick")
    assert (reader.folder / "runs/demo/report.html").is_file()
    assert load(reader.folder / "runs/demo/model")[0].config.model_type == "vlm"


def make_test(reader: Reader, line: str) -> None:
    told = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".venv/bin/pytest" in told.stdout


def activate(reader: Reader, line: str) -> None:
    before = reader.type("command -v vlm || true")
    reader.activated = line
    found = reader.type("command -v vlm").strip()
    assert Path(found).samefile(reader.folder / ".venv/bin/vlm")
    assert found != before.strip()


def chat(reader: Reader, line: str) -> None:
    assert reader.type(line).strip()


def serve(reader: Reader, line: str) -> None:
    reader.leave_running(line.replace("--port 8000", f"--port {reader.port}"))
    assert reader.server is not None
    assert reader.server.stdout is not None
    assert f"is served at http://127.0.0.1:{reader.port} " in reader.server.stdout.readline()


def ask(reader: Reader, script: str) -> None:
    """OpenAI's client, and the page that the paragraph below it names."""
    file = reader.folder / "ask.py"
    file.write_text(script.replace("127.0.0.1:8000", f"127.0.0.1:{reader.port}"), encoding="utf-8")
    assert reader.type("python ask.py").strip()
    with urllib.request.urlopen(f"http://127.0.0.1:{reader.port}/") as page:
        assert b"<html" in page.read()
    assert reader.stop_server() == 0


def data_check(reader: Reader, line: str) -> None:
    told = reader.type(line)
    assert re.search(rf"\b{ROWS}\b", told), told
    found = json.loads(reader.type(f"{line} --json"))
    assert (found["rows"], found["good"], found["bad_rows"]) == (ROWS, ROWS, [])


def train(reader: Reader, line: str) -> None:
    reader.type(line)
    assert load(reader.folder / "runs/mine/model")[0].config.model_type == "vlm"
    metrics = [json.loads(text) for text in (reader.folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < 0.5 < metrics[0]["loss"]


def resume(reader: Reader, line: str) -> None:
    files = [reader.folder / "runs/mine" / name for name in ("model/model.safetensors", "metrics.jsonl", "recipe.yaml")]
    before = [file.read_bytes() for file in files]
    reader.type(line)
    assert [file.read_bytes() for file in files] == before


def report(reader: Reader, line: str) -> None:
    page = reader.folder / reader.type(line).strip()
    assert page == reader.folder / "runs/mine/report.html"
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "Stage chat" in text


def eval_rows(reader: Reader, line: str) -> None:
    """What it was tuned on is known, and by the pictures."""
    reader.type(line)
    right = {name: reader.json(f"runs/eval/{name}scores.json") for name in ("", "blind/", "shuffled/")}
    accuracy = {name: found["metrics"]["accuracy"] for name, found in right.items()}
    assert right[""]["n"] == ROWS
    assert accuracy[""] >= 0.9, accuracy
    assert max(accuracy["blind/"], accuracy["shuffled/"]) < accuracy[""] - 0.3, accuracy
    assert (reader.folder / "runs/eval/report.html").is_file()


def eval_vqa(reader: Reader, line: str) -> None:
    told = reader.type(line)
    found = reader.json("runs/vqa/scores.json")
    assert found["n"] == IN_VQA
    assert found["metrics"]["accuracy"] >= 75 > reader.json("runs/vqa/blind/scores.json")["metrics"]["accuracy"]
    assert re.search(r"^accuracy .* blind .* shuffled", told, re.MULTILINE), told
    assert len(reader.json("runs/vqa/predictions.json")) == IN_VQA


def score(reader: Reader, line: str) -> None:
    told = reader.type(line)
    ours, theirs = (reader.json(f"runs/vqa/{name}scores.json")["metrics"]["accuracy"] for name in ("", "blind/"))
    own, compared = re.findall(r"^ +accuracy +(.*)", told, re.MULTILINE)
    assert float(own.split()[0]) == ours
    assert [float(figure) for figure in compared.split()[:3]] == [ours, theirs, ours - theirs]


def import_llava(reader: Reader, line: str) -> None:
    assert shlex.split(line)[2] == "llava-hf/llava-1.5-7b-hf"
    reader.type(line)
    assert load(reader.folder / "models/llava")[0].config.fusion == "early"


def export_llava(reader: Reader, line: str) -> None:
    from transformers import AutoModelForImageTextToText

    assert "largest difference" in reader.type(line)
    model = AutoModelForImageTextToText.from_pretrained(reader.folder / "exported")
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def export_mine(reader: Reader, line: str) -> None:
    assert "largest difference" in reader.type(line)
    answer = 'vlm chat {} --image mydata/images/0.png "What is in the picture?"'
    assert reader.type(answer.format("mine")) == reader.type(answer.format("runs/mine/model"))


CHECKS: list[tuple[str, Callable[..., None]]] = [
    ("make demo", make_demo),
    ("make test", make_test),
    ("source .venv/bin/activate", activate),
    ("vlm chat runs/demo/model", chat),
    ("vlm serve runs/demo/model", serve),
    ("import base64, openai", ask),
    ("vlm data check mydata/rows.jsonl", data_check),
    ("vlm train configs/finetune.yaml", train),
    ("vlm train runs/mine/recipe.yaml", resume),
    ("vlm report runs/mine", report),
    ("vlm eval runs/mine/model --task exact", eval_rows),
    ("vlm eval runs/mine/model --task vqav2", eval_vqa),
    ("vlm score vqav2", score),
    ("vlm import", import_llava),
    ("vlm export models/llava --to llava-hf", export_llava),
    ("vlm export runs/mine/model --to vlm", export_mine),
]


def test_every_line_has_a_check() -> None:
    found = lines(README)
    assert len(found) == len(CHECKS), "a line without a check, or a check without a line"
    for line, (beginning, _) in zip(found, CHECKS, strict=True):
        assert line.text.startswith(beginning)


def test_commands_are_those_of_the_activated_environment() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert not [page.name for page in pages if ".venv/bin/vlm" in page.read_text(encoding="utf-8")]


@pytest.fixture
def reader(tmp_path: Path, tiny_tokenizer: Any) -> Iterator[Reader]:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    write_own_rows(tmp_path / "mydata")
    write_vqa(tmp_path / "vqa")
    make_llava(tmp_path / "llava-hf/llava-1.5-7b-hf", tiny_tokenizer)
    reader = Reader(tmp_path)
    yield reader
    if reader.server is not None and reader.server.poll() is None:
        reader.stop_server()


def photo(seed: int) -> Image.Image:
    """Soft blobs of colours: what a photograph is to a small encoder, and no two alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((300, 225), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = soft + rng.integers(-12, 13, soft.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_own_rows(folder: Path) -> None:
    """Rows of the form that README shows."""
    shown = json.loads(next(block.text for block in blocks(README) if block.tag == "json"))
    assert sorted(shown) == ["answer", "image", "question"]
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        photo(number).save(folder / "images" / f"{number}.png")
        question, answer = str(rng.choice(QUESTIONS)), str(rng.choice(ANSWERS))
        if number < IN_VQA:
            question, answer = QUESTIONS[0] + SHORT, ANSWERS[number]
        rows.append({"image": f"{number}.png", "question": question, "answer": answer})
    write_lines(folder / "rows.jsonl", rows)


def write_vqa(folder: Path) -> None:
    asked = [{"question_id": n, "image_id": n, "question": QUESTIONS[0]} for n in range(IN_VQA)]
    told = [annotation(n, [ANSWERS[n]] * 10, image_id=n) for n in range(IN_VQA)]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": told})
    (folder / "val2014").mkdir()
    for n in range(IN_VQA):
        photo(n).save(folder / f"val2014/COCO_val2014_{n:012}.jpg", quality=95)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_does_what_it_says(reader: Reader) -> None:
    began = time.monotonic()
    for line, (_, check) in zip(lines(README), CHECKS, strict=True):
        check(reader, line.text)
        print(f"{time.monotonic() - began:5.0f} s  {line.text.splitlines()[0]}")
