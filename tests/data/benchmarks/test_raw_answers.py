"""Answers as people have them: LLaVA's raw files in every task, results of ScienceQA's scripts, our own journals."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks.captions import Captions
from data.benchmarks.choice import ScienceQA
from tests.data.benchmarks.files import annotation, score, write, write_lines

Capture = pytest.CaptureFixture[str]


def choice(answer: int, **more: Any) -> dict[str, Any]:
    return {"question": "?", "choices": ["x", "y", "z"], "answer": answer, **more}


# task: references, and what was said to be right for 1 and wrong for 2
TASKS: dict[str, tuple[Any, str, str]] = {
    "vqav2": ({"annotations": [annotation(n, ["red"] * 10) for n in (1, 2)]}, "red", "blue"),
    "textvqa": (
        {"data": [{"question_id": n, "image_id": "p", "question": "?", "answers": ["red"] * 10} for n in (1, 2)]},
        "Red.",
        "blue",
    ),
    "vizwiz": ([{"image": str(n), "answers": [{"answer": "red"}] * 10} for n in (1, 2)], "Red.", "blue"),
    "coco-caption": (
        {"annotations": [{"image_id": n, "caption": f"a dog number {n}"} for n in (1, 2)]},
        "a dog number 1",
        "x",
    ),
    "pope": ([{"question_id": n, "label": "yes"} for n in (1, 2)], "Yes", "No, there is none."),
    "gqa": ({"1": {"answer": "red"}, "2": {"answer": "red"}}, "Red.", "blue"),
    "scienceqa": ({"1": choice(1), "2": choice(1)}, "B. y", "C"),
    "exact": ([{"id": n, "question": "?", "answer": "red"} for n in (1, 2)], "red", "blue"),
    "mmbench": ("index\tquestion\tA\tB\tanswer\n1\t?\tx\ty\tA\n2\t?\tx\ty\tA\n", "(A)", "B"),
}


def references(folder: Path, task: str) -> Path:
    held = TASKS[task][0]
    if task == "mmbench":
        (folder / "mmbench.tsv").write_text(held)
        return folder / "mmbench.tsv"
    return write_lines(folder / "r.jsonl", held) if task in ("pope", "exact") else write(folder / "r.json", held)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("ids", [int, str])
@pytest.mark.parametrize("form", ["lines", "list", "journal", "answer"])
def test_every_task_takes_llavas_raw_answers(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, task: str, ids: type, form: str
) -> None:
    monkeypatch.setattr("data.benchmarks.java.missing", lambda: "this takes seconds")
    _, right, wrong = TASKS[task]
    llava = {"prompt": "?", "answer_id": "x7", "model_id": "llava", "metadata": {}}
    if form == "journal":  # what `vlm eval` keeps
        rows = [{"id": ids(n), "answer": text, "seconds": 0.1} for n, text in ((2, wrong), (1, right))]
    elif form == "answer":
        rows = [{"question_id": ids(n), "answer": text} for n, text in ((2, wrong), (1, right))]
    else:
        rows = [{"question_id": ids(n), **llava, "text": text} for n, text in ((2, wrong), (1, right))]
    path = (write if form == "list" else write_lines)(tmp_path / "answers.jsonl", rows)
    code, out, err = score(capsys, task, path, references(tmp_path, task), "--json", "--per-item", "--bootstrap", 0)
    assert code == 0, err
    told = json.loads(out)
    assert set(told["per_item"]) == {"1", "2"}
    assert told["per_item"]["1"] > told["per_item"]["2"] == 0


@pytest.mark.parametrize("name", ["COCO_val2014_000000000042.jpg", "42", "000000000042"])
@pytest.mark.parametrize("key", ["image_id", "question_id", "image"])
@pytest.mark.parametrize("listed", [True, False])
def test_captions_may_name_the_file_of_their_picture(tmp_path: Path, name: str, key: str, listed: bool) -> None:
    held: dict[str, Any] = {"annotations": [{"image_id": n, "caption": f"a dog {n}"} for n in (42, 7)]}
    if listed:
        held["images"] = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg"} for n in (42, 7)]
    path = write_lines(tmp_path / "said.jsonl", [{key: name, "text": "a dog 42"}, {"image_id": 7, "caption": "x"}])
    given = Captions().matched(path, write(tmp_path / "captions.json", held))
    assert given.answers == {"42": "a dog 42", "7": "x"}


def test_files_that_no_number_names_are_found_in_the_annotations(tmp_path: Path) -> None:
    held = {"annotations": [{"image_id": 5, "caption": "a dog"}], "images": [{"id": 5, "file_name": "dog.jpg"}]}
    path = write_lines(tmp_path / "said.jsonl", [{"image": "dog.jpg", "caption": "a dog"}])
    assert Captions().matched(path, write(tmp_path / "captions.json", held)).answers == {"5": "a dog"}


PROBLEMS = {str(n): choice(n % 3, split="test") for n in range(4)}


@pytest.mark.parametrize("form", ["results", "judged"])
def test_results_of_the_scripts_of_scienceqa_are_taken(tmp_path: Path, form: str) -> None:
    """By LLaVA's: the number of each choice, -1 where it read none; or its answers in two lists."""
    if form == "results":
        held: Any = {"acc": 50.0, "correct": 2, "count": 4, "results": {"0": 0, "1": 1, "2": 0, "3": -1}}
    else:
        said = {"0": "A", "1": "The answer is B.", "2": "A. x", "3": "no idea"}
        rows = [{"question_id": i, "parsed_ans": "?", "ground_truth": "?", "pred": text} for i, text in said.items()]
        held = {"correct": rows[:2], "incorrect": rows[2:]}
    scores = ScienceQA().score_files(write(tmp_path / "result.json", held), write(tmp_path / "problems.json", PROBLEMS))
    assert scores.per_item == {"0": 1, "1": 1, "2": 0, "3": 0}
    assert scores.notes["unparsed"] == 1
    if form == "results":
        told = {"outputs": {"0": "B", "1": "B", "2": "B", "3": "B"}, **held}  # the texts say more than the numbers
        scores = ScienceQA().score_files(write(tmp_path / "r.json", told), tmp_path / "problems.json")
        assert scores.per_item == {"0": 0, "1": 1, "2": 0, "3": 0}


def test_results_that_are_no_numbers_of_choices_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "result.json", {"results": {"0": True, "1": -2, "2": "B", "3": 99, "4": 1.0}})
    found = ScienceQA().predictions(path)
    assert found.answers == {}
    assert found.broken == [
        f"results[{n}]: the number of a choice is needed, not {value}"
        for n, value in enumerate(["True", "-2", "'B'", "99", "1.0"])
    ]
    path.write_text('{"results": {"0": 1, "1": 2, "0": 2}}')
    assert (ScienceQA().predictions(path).answers, ScienceQA().predictions(path).repeated) == (
        {"0": "B", "1": "C"},
        ["0"],
    )
