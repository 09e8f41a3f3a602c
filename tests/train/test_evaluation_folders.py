"""Folders of evaluations: whose they are, how parts become one, and what is told again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.evaluations import QUESTION, ask, scores, write_rows
from train.evaluation.journal import Journal
from train.evaluation.local import LocalModel
from vlm.cli import main
from vlm.errors import UserError


def test_shards_are_merged_to_the_same_evaluation(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, data, tmp_path / "whole", "--controls") == 0
    for part in (1, 2):
        assert ask(model, data, tmp_path / f"part{part}", "--shard", f"{part}/2", "--controls") == 0
    parts = [str(tmp_path / "part1"), str(tmp_path / "part2")]
    assert main(["eval", "merge", *parts, "--out", str(tmp_path / "merged")]) == 0
    assert scores(tmp_path / "merged") == scores(tmp_path / "whole")
    before = (tmp_path / "merged" / "scores.json").read_bytes()
    assert ask(model, data, tmp_path / "merged", "--limit", "2") == 1  # its answers are kept from others
    assert main(["eval", "merge", parts[0], "--out", str(tmp_path / "merged")]) == 1
    assert (tmp_path / "merged" / "scores.json").read_bytes() == before
    assert (tmp_path / "merged" / "settings.json").is_file()
    capsys.readouterr()
    assert main(["eval", "merge", parts[0], "--out", str(tmp_path / "half")]) == 1
    assert not (tmp_path / "half").exists()
    assert "4 of 12 questions have no answer yet" in capsys.readouterr().err
    assert ask(model, data, tmp_path / "other", "--limit", "3") == 0
    assert main(["eval", "merge", parts[0], str(tmp_path / "other"), "--out", str(tmp_path / "x")]) == 1
    assert "evaluations with another limit" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "file", "here"])
def test_nothing_but_an_evaluation_is_touched(
    model: Path,
    data: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    precious = tmp_path / "precious"
    if kind == "file":
        precious.write_text("thesis")
    else:
        precious.mkdir()
        (precious / "thesis.txt").write_text("thesis")
    if kind == "here":
        monkeypatch.chdir(precious)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert ask(model, data, Path() if kind == "here" else precious) == 1
    assert "not an evaluation folder; use another --out" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_another_evaluation_needs_another_folder(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, data, tmp_path / "out", "--limit", "2") == 0
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert ask(model, data, tmp_path / "out", "--limit", "3") == 1
    assert "out: holds an evaluation with another limit (2, and not 3); use another --out" in capsys.readouterr().err
    assert ask(model, data, tmp_path / "out", "--limit", "2", "--control", "blind") == 1
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_two_at_once_in_one_folder_are_one_too_many(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, told = LocalModel._generate, list[int]()

    def meanwhile(self: LocalModel, batch: Any) -> list[str]:
        if not told:
            told.append(0)
            told[0] = ask(model, data, tmp_path / "out")
        return real(self, batch)

    monkeypatch.setattr(LocalModel, "_generate", meanwhile)
    assert ask(model, data, tmp_path / "out") == 0
    assert told == [1]
    assert "out: another process is at work on this evaluation" in capsys.readouterr().err
    assert scores(tmp_path / "out")["n"] == 12
    assert not list((tmp_path / "out").glob("*.lock"))


def test_what_is_told_again_is_told_as_it_is_now(model: Path, tmp_path: Path) -> None:
    """Other references and modes score the same answers; other pictures under the same names ask again."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {**QUESTION, "image": "a.png"}
    assert ask(model, write_rows(tmp_path / "q.jsonl", [row]), tmp_path / "out") == 0
    before = json.loads((tmp_path / "out" / "scores.json").read_text())
    said = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())["answer"]
    right = {**row, "answer": f"{said.upper()}."}
    assert ask(model, write_rows(tmp_path / "q.jsonl", [right]), tmp_path / "out", "--mode", "normalised") == 0
    after = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (before["metrics"]["accuracy"], after["metrics"]["accuracy"], after["mode"]) == (0, 1, "normalised")
    assert after["seconds"] == before["seconds"] > 0
    Image.new("RGB", (90, 80), "red").save(tmp_path / "a.png")
    assert ask(model, tmp_path / "q.jsonl", tmp_path / "out") == 1


def test_parts_keep_the_model_that_answered_and_are_merged_anywhere(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied, moved = tmp_path / "model", tmp_path / "moved"
    shutil.copytree(model, copied)
    shutil.copytree(data.parent, moved)
    for part, device in ((1, "cpu"), (2, "cpu:0")):
        options = ("--shard", f"{part}/2", "--device", device)
        assert ask(copied, moved / data.name, tmp_path / f"part{part}", *options) == 0
    asked_of = json.loads((tmp_path / "part1" / "settings.json").read_text())["model_sha256"]
    shutil.rmtree(copied)
    shutil.rmtree(moved)
    merge = ["eval", "merge", str(tmp_path / "part1"), str(tmp_path / "part2"), "--out", str(tmp_path / "merged")]
    assert main(merge) == 1
    assert "q.jsonl: no such data file" in capsys.readouterr().err
    assert main([*merge, "--data", str(data), "--mode", "normalised"]) == 0
    found = scores(tmp_path / "merged")
    assert (found["settings"]["model_sha256"], found["mode"], found["n"]) == (asked_of, "normalised", 12)
    rows = [{**QUESTION, "id": f"q{n}"} for n in range(12)]
    assert main([*merge, "--data", str(write_rows(tmp_path / "others.jsonl", rows))]) == 1
    assert "the questions are others than those of " in capsys.readouterr().err


def test_a_folder_is_not_taken_from_a_process_that_has_answered_nothing_yet(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", 1, 2)
    first.claim({"limit": 3})
    with pytest.raises(UserError, match=r"holds an evaluation with another limit \(3, and not 2\)"):
        Journal(tmp_path / "out").claim({"limit": 2})
    first.close()
    last = Journal(tmp_path / "out")
    last.claim({"limit": 2})
    last.close()


def test_what_a_kill_before_the_first_answer_leaves_is_nobodys(model: Path, data: Path, tmp_path: Path) -> None:
    assert ask(model, data, tmp_path / "out", "--limit", "3", "--shard", "1/2") == 0
    (tmp_path / "out" / "answers-1-of-2.jsonl").write_bytes(b"")
    (tmp_path / "out" / "answers-1-of-2.lock").touch()
    assert ask(model, data, tmp_path / "out", "--limit", "2") == 0
    assert scores(tmp_path / "out")["n"] == 2


def test_rows_of_answers_that_are_none_are_asked_again(model: Path, data: Path, tmp_path: Path) -> None:
    assert ask(model, data, tmp_path / "out", "--limit", "4") == 0
    before, answers = scores(tmp_path / "out"), tmp_path / "out" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    write_rows(answers, [{**rows[0], "answer": 3}, {**rows[1], "seconds": "x"}, {"id": rows[2]["id"]}, rows[3]])
    assert ask(model, data, tmp_path / "out", "--limit", "4") == 0
    assert scores(tmp_path / "out") == before


def test_parts_of_other_machines_have_other_paths(model: Path, data: Path, tmp_path: Path) -> None:
    for part in (1, 2):
        shutil.copytree(data.parent, tmp_path / f"data{part}")
        there = tmp_path / f"data{part}" / data.name
        assert ask(model, there, tmp_path / f"part{part}", "--shard", f"{part}/2") == 0
    parts = [str(tmp_path / "part1"), str(tmp_path / "part2")]
    assert main(["eval", "merge", *parts, "--out", str(tmp_path / "merged")]) == 0
    assert scores(tmp_path / "merged")["n"] == 12


def test_a_model_that_cannot_be_loaded_leaves_nothing(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    for path in broken.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:5000])
    assert ask(broken, data, tmp_path / "out", "--controls") == 1
    assert "cut off or broken" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
