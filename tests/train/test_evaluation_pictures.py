"""Pictures of an evaluation: those that are missing, and those that its page shows."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from train.evaluation import run as evaluation_run
from train.evaluation.prompts import Prompt, Reply
from train.evaluation.remote import data_url
from vlm.cli import main
from vlm.errors import UserError

COLOURS = ("red", "lime", "blue")


class Looker:
    """Answers with the name of a question's picture, as far as there is one."""

    keeps_batches = False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def replies(self, batches: Any) -> Iterator[list[Reply]]:
        for prompt in (prompt for batch in batches for prompt in batch):
            self.asked.append(prompt.id)
            yield [self._reply(prompt)]

    def _reply(self, prompt: Prompt) -> Reply:
        try:
            for image in prompt.images:
                data_url(image)
        except UserError as error:
            return Reply.failed(prompt, error)
        return Reply(prompt.id, "".join(Path(str(image)).stem for image in prompt.images))


@pytest.fixture(autouse=True)
def looker(monkeypatch: pytest.MonkeyPatch) -> Looker:
    made = Looker()
    monkeypatch.setattr(evaluation_run, "opened", lambda *_: nullcontext(made))
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A question for each of three pictures, and one whose picture isn't there."""
    for colour in COLOURS:
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
    rows = [{"id": name, "image": f"{name}.png", "question": "?", "answer": name} for name in (*COLOURS, "gone")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "q.jsonl"


def ask(data: Path, out: Path, *options: str) -> int:
    command = ["eval", "m", "--engine", "http://m", "--task", "exact", "--data", str(data), "--out", str(out)]
    return main([*command, *options])


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


@pytest.mark.parametrize("empty", [False, True])
def test_missing_pictures_stop_an_evaluation_before_anything_is_asked(
    data: Path, empty: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if empty:
        (data.parent / "gone.png").touch()
    out = data.parent / "out"
    assert ask(data, out) == 1
    assert "1 pictures are not there (gone.png), such as " in capsys.readouterr().err
    assert not out.exists()
    assert ask(data, out, "--limit", "3") == 0
    assert read(out)["metrics"]["accuracy"] == 1


def test_questions_without_their_picture_may_fail_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    assert ask(data, out, "--allow-partial") == 0
    assert "1 questions failed and are scored as wrong; the first: " in capsys.readouterr().out
    found = read(out)
    assert (found["n"], found["failed"], found["metrics"]["accuracy"]) == (4, 1, 0.75)
    assert found["pictures_shown"] == 3
    assert found["failures"] == [{"id": "gone", "error": f"{data}:4: image 'gone.png' is not in {data.parent}"}]
    for part in "12":
        assert ask(data, data.parent / part, "--shard", f"{part}/2", "--allow-partial") == 0
    assert main(["eval", "merge", str(data.parent / "1"), str(data.parent / "2"), "--out", str(data.parent / "m")]) == 0
    assert read(data.parent / "m")["per_item"] == found["per_item"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_picture_that_is_there_now_is_asked_about_again_and_no_other(
    data: Path, looker: Looker, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = data.parent / "out", data.parent / "gone.png"
    assert ask(data, out, "--allow-partial") == 0
    Image.new("RGB", (16, 16), "white").save(picture)
    assert ask(data, out) == 0
    assert (read(out)["failed"], read(out)["pictures_shown"]) == (1, 3)  # it's there, and was not at that time
    looker.asked.clear()
    for part in range(1, shards + 1):
        assert ask(data, out, "--retry-failed", "--shard", f"{part}/{shards}") == 0
    if shards > 1:
        assert main(["eval", "merge", str(out), "--out", str(out)]) == 0
    assert looker.asked == ["gone"]
    assert (read(out)["failed"], read(out)["metrics"]["accuracy"]) == (0, 1)
    looker.asked.clear()
    assert ask(data, out) == 0
    assert looker.asked == []
    Image.new("RGB", (90, 80), "white").save(picture)
    before = (out / "answers.jsonl").read_bytes()
    assert ask(data, out) == 1
    assert "the pictures of 1 questions are others than those they were asked about (gone)" in capsys.readouterr().err
    assert (out / "answers.jsonl").read_bytes() == before


def test_a_blind_question_is_asked_again_with_its_picture_too(data: Path, looker: Looker) -> None:
    out = data.parent / "out"
    assert ask(data, out, "--allow-partial", "--control", "blind") == 0
    Image.new("RGB", (16, 16), "white").save(data.parent / "gone.png")
    looker.asked.clear()
    assert ask(data, out, "--control", "blind", "--retry-failed") == 0
    assert looker.asked == ["gone"]
    assert read(out)["failed"] == 0
    assert read(out)["pictures_shown"] == 0


def test_a_page_that_cannot_be_written_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    assert ask(data, out, "--limit", "2") == 0
    for path in (out / "thumbnails").iterdir():
        path.unlink()
    (out / "thumbnails").rmdir()
    (out / "thumbnails").touch()
    assert ask(data, out, "--limit", "2") == 1
    assert "thumbnails: can't be written (File exists); the answers are kept" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [1, 2])
def test_the_time_of_all_runs_counts(data: Path, looker: Looker, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches, of two questions and of one, that take a second each."""
    monkeypatch.setattr(evaluation_run, "time", SimpleNamespace(perf_counter=count().__next__))
    real, out = looker.replies, data.parent / "out"
    monkeypatch.setattr(looker, "replies", lambda batches: ([*chain(*real([batch]))] for batch in batches))
    for part in range(1, shards + 1):
        assert ask(data, out, "--limit", "3", "--batch-size", "2", "--shard", f"{part}/{shards}") == 0
    assert main(["eval", "merge", str(out), "--out", str(out)]) == 0
    assert (read(out)["seconds"], read(out)["seconds_per_question"]) == (2, pytest.approx(2 / 3, abs=1e-6))


def test_demonstrations_are_of_pictures_that_are_there(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    options = ("--limit", "3", "--shots", "2", "--shots-data", str(data))
    assert ask(data, out, *options) == 1
    assert "1 pictures are not there (gone.png)" in capsys.readouterr().err
    assert ask(data, out, *options, "--allow-partial") == 0
    assert read(out)["failed"] == 0
    assert ask(data, data.parent / "x", *options[:-1], str(data.parent / "none.jsonl")) == 1
    assert f"--shots-data: {data.parent}/none.jsonl: no such data file" in capsys.readouterr().err


def test_the_page_shows_what_the_model_saw(data: Path) -> None:
    out = data.parent / "out"
    assert ask(data, out, "--limit", "3", "--controls") == 0
    for folder in (out, out / "shuffled"):
        seen = {}
        for card in cards(folder):
            with Image.open(folder / card["image"]) as thumbnail:
                seen[card["id"]] = nearest(thumbnail.getpixel((8, 8)))
        said = {row["id"]: row["answer"] for row in rows(folder / "answers.jsonl")}
        assert seen == said
        assert (seen == {name: name for name in COLOURS}) is (folder == out)
    assert [card["image"] for card in cards(out / "blind")] == [None] * 3


def cards(folder: Path) -> list[dict[str, Any]]:
    page = (folder / "report.html").read_text()
    found: list[dict[str, Any]] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def nearest(pixel: Any) -> str:
    return COLOURS[max(range(3), key=lambda channel: int(pixel[channel]))]
