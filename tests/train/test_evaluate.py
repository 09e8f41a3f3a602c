"""`vlm eval`: what it leaves, what it refuses before a model is asked, and what it can't score."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.recipes import chat_recipe, write_recipe
from train.answer import Answerer, Question
from vlm.checkpoint import load
from vlm.cli import main
from vlm.errors import UserError


@pytest.fixture(scope="module")
def model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = write_recipe(folder / "r.yaml", chat_recipe(scenes, steps=1))
    assert main(["train", str(recipe), "--out", str(folder / "run")]) == 0
    return folder / "run" / "model"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(model: Path, data: Path, out: Path, *options: str, task: str = "exact") -> int:
    return main(["eval", str(model), "--task", task, "--data", str(data), "--out", str(out), *options])


QUESTION = {"id": "a", "question": "what is it?", "answer": "a circle"}


@pytest.mark.parametrize("kind", ["folder", "file", "here"])
def test_nothing_but_an_evaluation_is_replaced(
    model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "q.jsonl", [QUESTION])
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


def test_an_evaluation_is_replaced_by_a_newer_one(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "q.jsonl", [QUESTION, {**QUESTION, "id": "b"}])
    for limit in (1, 2):
        assert ask(model, data, tmp_path / "out", "--limit", str(limit)) == 0
        assert json.loads((tmp_path / "out" / "scores.json").read_text())["n"] == limit


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([QUESTION, QUESTION], "1 ids come twice, the first is a"),
        ([{**QUESTION, "question": "what? " * 400}], "don't fit the model's context of 512"),
    ],
)
def test_what_cannot_be_asked_is_named(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--limit", "--batch-size", "--max-tokens"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_below_one_are_usage_errors(
    model: Path, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        ask(model, tmp_path / "q.jsonl", tmp_path / "out", option, value)
    assert stopped.value.code == 2
    assert f"argument {option}: must be at least 1, got {value}" in capsys.readouterr().err


def test_an_answer_may_fill_the_context_to_its_end(model: Path) -> None:
    network, processor = load(model)
    question = Question("a", "what is it?")
    prompt = len(Answerer(network, processor)._encode(question))
    assert len(Answerer(network, processor, max_tokens=512 - prompt)._encode(question)) == prompt
    with pytest.raises(UserError, match="question a"):
        Answerer(network, processor, max_tokens=513 - prompt)._encode(question)


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
    assert [row["question_id"] for row in json.loads((tmp_path / "out" / "predictions.json").read_text())] == [3]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["n"], scores["unscored"], scores["metrics"]) == (0, 1, {})


@pytest.mark.parametrize("content", ['{"questions": null}', '{"questions": 5}', "[" * 5000])
def test_files_of_another_shape_are_refused(
    model: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.json").write_text(content)
    assert ask(model, tmp_path / "questions.json", tmp_path / "out", task="vqav2") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "questions.json") in error
    assert "[" + "TypeError" not in error
    assert "Error;" not in error
