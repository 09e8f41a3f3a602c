"""An evaluation that is killed and started again, as a whole process: nothing is lost, nothing is asked twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import TinyModels

ROOT = Path(__file__).resolve().parents[2]
WORDS = "what colour is the big small red blue thing on a table near my old car today".split()


def write_vqa(folder: Path, questions: int, images: int = 50) -> Path:
    """Questions and annotations as VQAv2 publishes them."""
    rng = random.Random(0)
    (folder / "val2014").mkdir(parents=True)
    for number in range(images):
        colour = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (48, 40), colour).save(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    asked, annotated = [], []
    for number in range(questions):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) + "?"
        asked.append({"question_id": number, "image_id": number % images, "question": text})
        answers = [{"answer": rng.choice(WORDS), "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]
        kinds = {"answer_type": rng.choice(["yes/no", "number", "other"]), "question_type": text.split()[0]}
        annotated.append({"question_id": number, "image_id": number % images, "answers": answers, **kinds})
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotated}))
    return folder


def command(model: Path, data: Path, out: Path) -> list[str]:
    options = ["--task", "vqav2", "--data", str(data), "--out", str(out), "--batch-size", "32", "--max-tokens", "4"]
    return [sys.executable, "-P", "-m", "vlm.cli", "eval", str(model), *options]


def without_times(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "scores.json").read_text())
    return {name: value for name, value in found.items() if "seconds" not in name}


@pytest.mark.parametrize(
    ("questions", "kills"),
    [
        pytest.param(2_000, 2, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(20_000, 3, marks=[pytest.mark.soak, pytest.mark.timeout(3000)]),
    ],
)
def test_killed_and_started_again_it_gives_the_same_scores(
    tiny_models: TinyModels, tmp_path: Path, questions: int, kills: int
) -> None:
    model, data = tiny_models("early", "mlp"), write_vqa(tmp_path / "vqa", questions)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answers = tmp_path / "killed" / "answers.jsonl"
    for kill in range(1, kills + 1):
        running = subprocess.Popen(command(model, data, answers.parent), env=environment, stderr=subprocess.DEVNULL)
        wanted = questions * kill // (kills + 1)
        while lines(answers) < wanted:
            assert running.poll() is None
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert lines(answers) < questions
    for folder in (answers.parent, tmp_path / "whole"):
        subprocess.run(command(model, data, folder), env=environment, check=True)
    assert without_times(answers.parent) == without_times(tmp_path / "whole")
    said, whole = replies(answers), replies(tmp_path / "whole" / answers.name)
    assert [name for name, _ in said] == sorted(map(str, range(questions)))
    assert said == whole


def replies(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((row["id"], row["answer"]) for row in rows)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
