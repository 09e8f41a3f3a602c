"""An evaluation scores what it submits, shows the bare script's figure beside it, and says which pictures it showed."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.data.benchmarks.files import annotation, picture, write, write_lines
from train.evaluation import run as evaluation_run
from train.evaluation.prompts import Reply
from vlm.cli import main

SAID = {"1": "Yes", "2": "It's a dog.", "3": "two"}
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
Capture = pytest.CaptureFixture[str]


class Speaker:
    """Says what it is told to, whatever it's asked."""

    keeps_batches = False

    def replies(self, batches: Any) -> Iterator[list[Reply]]:
        for batch in batches:
            yield [Reply(prompt.id, SAID[prompt.id]) for prompt in batch]


@pytest.fixture(autouse=True)
def speaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_run, "opened", lambda *_: nullcontext(Speaker()))


def evaluate(task: str, data: Path, out: Path, *options: str) -> dict[str, Any]:
    engine = ["--engine", "http://127.0.0.1:9"]
    assert main(["eval", "m", "--task", task, "--data", str(data), "--out", str(out), *engine, *options]) == 0
    found: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return found


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    """Questions whose annotators agree to the letter: the script normalises nothing for them."""
    rows = [{"question_id": n, "image_id": n, "question": "is it?"} for n in (1, 2, 3)]
    told = [annotation(1, ["yes"] * 10), annotation(2, ["it 's dog"] * 10), annotation(3, ["two"] * 10)]
    write(tmp_path / "vqa" / QUESTIONS, {"questions": rows})
    write(tmp_path / "vqa" / ANNOTATIONS, {"annotations": told})
    for n in (1, 2, 3):
        picture(tmp_path / f"vqa/val2014/COCO_val2014_{n:012}.jpg")
    return tmp_path / "vqa"


def test_vqav2_is_scored_as_it_is_submitted(vqa: Path, tmp_path: Path, capsys: Capture) -> None:
    # yes; it 's dog; 2, which is not the annotators' two: the script normalises neither
    found = evaluate("vqav2", vqa, tmp_path / "out", "--controls")
    submitted = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [row["answer"] for row in submitted] == ["yes", "it 's dog", "2"]
    assert found["metrics"]["accuracy"] == pytest.approx(200 / 3)
    assert found["per_item"] == {"1": 100, "2": 100, "3": 0}
    assert found["other"]["metrics"]["accuracy"] == pytest.approx(100 / 3)  # two
    assert found["scored"] == "answers normalised as LLaVA submits them, by the official script"
    assert found["other"]["scored"] == "answers as they were given (raw), by the official script alone"
    told = capsys.readouterr().out
    assert "scored: answers normalised as LLaVA submits them" in told
    assert "otherwise: accuracy 33.3333 of answers as they were given (raw), by the official script alone" in told
    page = (tmp_path / "out/report.html").read_text()
    assert (
        "otherwise: accuracy <b>33.3333</b> (blind 33.3333) (shuffled 33.3333) of answers as they were given (raw)"
        in page
    )
    assert '"submitted": "it \\u0027s dog"' in page
    assert '"answer": "It\\u0027s a dog."' in page
    # what the model said is kept
    lines = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    assert {row["id"]: row["answer"] for row in map(json.loads, lines)} == SAID
    arguments = [str(tmp_path / "out/predictions.json"), str(vqa / ANNOTATIONS), "--json", "--per-item"]
    assert main(["score", "vqav2", *arguments]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["metrics"], again["per_item"]) == (found["metrics"], found["per_item"])


def test_a_mode_of_ones_own_is_scored_of_the_submission_too(vqa: Path, tmp_path: Path) -> None:
    found = evaluate("vqav2", vqa, tmp_path / "out", "--mode", "normalised")
    assert found["metrics"]["accuracy"] == 100
    assert (found["other"]["mode"], found["other"]["metrics"]["accuracy"]) == ("official", pytest.approx(100 / 3))


@pytest.mark.parametrize(
    ("with_pictures", "told"), [(3, "pictures shown with 3 of 3"), (1, "pictures shown with 1 of 3")]
)
def test_an_evaluation_says_how_many_pictures_it_showed(
    tmp_path: Path, capsys: Capture, with_pictures: int, told: str
) -> None:
    rows = [{"id": str(n), "question": "?", "answer": "x"} for n in (1, 2, 3)]
    for row in rows[:with_pictures]:
        row["image"] = picture(tmp_path / f"{row['id']}.png").name
    found = evaluate("exact", write_lines(tmp_path / "q.jsonl", rows), tmp_path / "out")
    assert found["pictures_shown"] == with_pictures
    assert f"control: none, {told} questions" in capsys.readouterr().out
    assert f"control: none, {told} questions" in (tmp_path / "out/report.html").read_text()
    assert "other" not in found


def test_an_evaluation_without_pictures_says_so(tmp_path: Path, capsys: Capture) -> None:
    """Whether its questions have none, or they were withheld."""
    rows = [{"id": str(n), "question": "?", "answer": "x"} for n in (1, 2, 3)]
    evaluate("exact", write_lines(tmp_path / "q.jsonl", rows), tmp_path / "out")
    assert "control: none, no picture shown with 3 questions" in capsys.readouterr().out
    for row in rows:
        row["image"] = picture(tmp_path / f"{row['id']}.png").name
    data = write_lines(tmp_path / "p.jsonl", rows)
    found = evaluate("exact", data, tmp_path / "two", "--controls")
    shown = [found["pictures_shown"], *(found["controls"][name]["pictures_shown"] for name in ("blind", "shuffled"))]
    assert shown == [3, 0, 3]
    page = (tmp_path / "two/blind/report.html").read_text()
    assert "control: blind, no picture shown with 3 questions" in page
    assert (
        "control: shuffled, other questions&#39; pictures shown with 3 of 3 questions"
        in (tmp_path / "two/shuffled/report.html").read_text()
    )
    for name in ("out", "two", "two/blind", "two/shuffled"):
        assert "images: none" not in (tmp_path / name / "report.html").read_text()
