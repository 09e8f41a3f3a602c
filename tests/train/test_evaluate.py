"""`vlm eval`: what it leaves, how it goes on, what it refuses before a model is asked, and what it can't score."""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.evaluations import QUESTION, ask, scores, write_rows
from train.evaluation import run as evaluation_run
from train.evaluation.local import LocalModel
from train.evaluation.prompts import Prompt, Reply, Turn
from vlm.checkpoint import load
from vlm.cli import main
from vlm.errors import UserError


def test_a_folder_holds_predictions_scores_and_a_page(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, data, tmp_path / "out", "--controls") == 0
    told = capsys.readouterr().out
    assert "prompt: '{question}', greedy decoding" in told
    assert "blind 0.0000" in told
    found = scores(tmp_path / "out")
    assert (found["n"], found["failed"], set(found["controls"])) == (12, 0, {"blind", "shuffled"})
    assert set(found["metrics"]) == {"accuracy", "accuracy/k0", "accuracy/k1"} == set(found["intervals"])
    assert found["settings"]["max_tokens"] == 6
    assert len(found["settings"]["model_sha256"]) == 64
    assert "auto" not in (found["settings"]["device"], found["settings"]["precision"])
    assert found["versions"]["torch"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(12)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert sorted(path.name for path in (tmp_path / "out" / "thumbnails").iterdir())[:2] == ["0.jpg", "1.jpg"]
    assert scores(tmp_path / "out" / "blind")["control"] == "blind"
    said = {"none": (tmp_path / "out" / "predictions.jsonl").read_text()}
    for control in ("none", "blind", "shuffled"):
        assert ask(model, data, tmp_path / control, "--control", control) == 0
        folder = tmp_path / "out" / ("" if control == "none" else control)
        said[control] = (tmp_path / control / "predictions.jsonl").read_text()
        assert (folder / "predictions.jsonl").read_text() == said[control]
    assert len(set(said.values())) == 3


class KilledError(Exception):
    pass


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_evaluation_goes_on_where_it_was(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    assert ask(model, data, tmp_path / "whole") == 0
    asked: list[str] = []
    real = LocalModel._generate

    def counting(self: LocalModel, batch: Any) -> list[str]:
        asked.extend(prompt.id for prompt in batch.prompts)
        if len(asked) in (8, 16) and not torn:
            raise KilledError
        return real(self, batch)

    monkeypatch.setattr(LocalModel, "_generate", counting)
    if torn:  # the last batch's lines are there in part, the last of them cut off
        assert ask(model, data, tmp_path / "out") == 0
        asked.clear()
        answers = tmp_path / "out" / "answers.jsonl"
        answers.write_bytes(answers.read_bytes()[:-60])
        (tmp_path / "out" / "scores.json").unlink()
    else:
        for _ in range(2):
            with pytest.raises(KilledError):
                ask(model, data, tmp_path / "out", "--debug")
        assert not (tmp_path / "out" / "scores.json").exists()
        asked.clear()
    assert ask(model, data, tmp_path / "out") == 0
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")
    lines = [json.loads(line)["id"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(f"q{n}" for n in range(12))
    assert 0 < len(asked) < 12
    asked.clear()
    assert ask(model, data, tmp_path / "out") == 0
    assert asked == []


def test_what_fails_is_recorded_and_wrong(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [
        {**QUESTION, "id": "good", "image": "good.png"},
        {**QUESTION, "id": "bad", "image": "bad.png"},
        {**QUESTION, "id": "long", "question": "what? " * 400},
    ]
    assert ask(model, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "out") == 0
    assert "2 questions failed and are scored as wrong" in capsys.readouterr().out
    found = scores(tmp_path / "out")
    assert (found["n"], found["failed"]) == (3, 2)
    assert {row["id"]: row["error"][-40:] for row in found["failures"]}.keys() == {"bad", "long"}
    assert any("don't fit the model's context of 512" in row["error"] for row in found["failures"])
    assert found["per_item"]["bad"] == found["per_item"]["long"] == 0
    assert '"failed"' in (tmp_path / "out" / "report.html").read_text()
    assert ask(model, write_rows(tmp_path / "q2.jsonl", rows[1:]), tmp_path / "none") == 1
    assert "every question failed; the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([QUESTION, QUESTION], (), r"1 ids come more than once (a)"),
        ([QUESTION], ("--rank",), "the questions of exact have no choices to rank"),
        ([QUESTION], ("--shots", "2"), "--shots takes demonstrations from --shots-data"),
        ([QUESTION], ("--engine", "tourch"), "--engine tourch: torch, vllm, or the URL"),
        ([QUESTION], ("--vllm-args", "'"), "--vllm-args ': No closing quotation"),
        ([QUESTION], ("--prompt", "what?"), "has no {question} in it"),
        ([QUESTION], ("--control", "shuffled"), "needs at least two different images"),
        ([QUESTION], ("--control", "blind", "--controls"), "leave --control out"),
        ([QUESTION], ("--engine", "torch", "--mode", "normalised", "--images", "nowhere"), "no such image folder"),
    ],
)
def test_what_cannot_be_asked_is_named_before_anything_is_written(
    model: Path,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    options: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask(model, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_in_a_row_is_written_as_a_question_mark(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "q.jsonl", [{**QUESTION, "kind": "\ud800"}])
    assert ask(model, data, tmp_path / "out") == 0
    assert set(scores(tmp_path / "out")["metrics"]) == {"accuracy", "accuracy/?"}


def test_what_failed_can_be_asked_again(model: Path, tmp_path: Path) -> None:
    rows = [{**QUESTION, "id": name, "image": f"{name}.png"} for name in ("good", "bad")]
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"x" * (tmp_path / "good.png").stat().st_size)
    data = write_rows(tmp_path / "q.jsonl", rows)
    assert ask(model, data, tmp_path / "out") == 0
    shutil.copy(tmp_path / "good.png", tmp_path / "bad.png")
    assert ask(model, data, tmp_path / "out") == 0
    assert scores(tmp_path / "out")["failed"] == 1
    assert ask(model, data, tmp_path / "out", "--retry-failed") == 0
    assert scores(tmp_path / "out")["failed"] == 0


def test_a_run_in_which_nothing_works_stops_early(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation_run, "HOPELESS", 8)
    rows = [{**QUESTION, "id": n, "question": "what? " * 400} for n in range(20)]
    assert ask(model, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "out") == 1
    assert "the first 8 questions have all failed (" in capsys.readouterr().err
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 8


def test_prompts_that_are_too_long_do_not_stop_a_run_in_which_others_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_run, "HOPELESS", 8)
    rows = [{**QUESTION, "id": n, "question": "what? " * (400 if n < 16 else 1)} for n in range(18)]
    assert ask(model, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "out") == 0
    assert (scores(tmp_path / "out")["failed"], scores(tmp_path / "out")["n"]) == (16, 18)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        *[(option, value, "must be at least 1") for option in ("--limit", "--batch-size") for value in ("0", "-1")],
        *[("--shard", value, "I/N is needed") for value in ("0/2", "3/2", "2", "a/b")],
    ],
)
def test_numbers_out_of_range_are_usage_errors(
    model: Path, tmp_path: Path, option: str, value: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        ask(model, tmp_path / "q.jsonl", tmp_path / "out", option, value)
    assert stopped.value.code == 2
    assert f"argument {option}: {complaint}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "MODEL", "--out", str(tmp_path)])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", "merge", "a", "--out", str(tmp_path), "--task", "exact", "--limit", "3"])
    assert "the parts know their own --task, --limit" in capsys.readouterr().err


def test_an_answer_may_fill_the_context_to_its_end(model: Path) -> None:
    network, processor = load(model)
    prompt = Prompt("a", (Turn("what is it?"),))
    length = len(LocalModel(network, processor, 1).encode(prompt))
    assert len(LocalModel(network, processor, max_tokens=512 - length).encode(prompt)) == length
    with pytest.raises(UserError, match="don't fit the model's context"):
        LocalModel(network, processor, max_tokens=513 - length).encode(prompt)


def test_questions_of_a_test_split_are_answered_without_being_scored(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next((scenes / "images" / "heldout").iterdir())
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "COCO_test2015_000000000007.png").write_bytes(picture.read_bytes())
    questions = {"questions": [{"question_id": 3, "question": "what is it?", "image_id": 7}]}
    (tmp_path / "vqa" / "questions.json").write_text(json.dumps(questions))
    assert ask(model, tmp_path / "vqa", tmp_path / "out", task="vqav2") == 0
    assert "1 questions without references: answered, not scored" in capsys.readouterr().out
    submitted = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["question_id"] for row in submitted] == [3]
    found = scores(tmp_path / "out")
    assert (found["n"], found["unscored"], found["metrics"]) == (0, 1, {})


@pytest.mark.parametrize("content", ['{"questions": null}', '{"questions": 5}', "[" * 5000])
def test_files_of_another_shape_are_refused(
    model: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.json").write_text(content)
    assert ask(model, tmp_path / "questions.json", tmp_path / "out", task="vqav2") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "questions.json") in error
    assert error.strip().count("\n") == 0


def test_an_engine_that_names_each_question_once_is_asked_only_what_is_missing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server is: its answers don't depend on a batch, so parts of batches are kept."""
    asked: list[str] = []

    class Parrot:
        keeps_batches = False

        def replies(self, batches: Any) -> Iterator[list[Reply]]:
            for batch in batches:
                for prompt in batch:
                    asked.append(prompt.id)
                    if len(asked) == 6:
                        raise KilledError
                    yield [Reply(prompt.id, "red")]

    monkeypatch.setattr(evaluation_run, "opened", lambda *_: nullcontext(Parrot()))
    with pytest.raises(KilledError):
        ask(model, data, tmp_path / "out", "--debug")
    assert ask(model, data, tmp_path / "out") == 0
    assert sorted(asked) == sorted([*(f"q{n}" for n in range(12)), asked[5]])
    assert scores(tmp_path / "out")["metrics"]["accuracy"] == 1
