"""`vlm score`: what it prints, what two runs differ in, and what it says of files that can't be scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.benchmarks.files import annotation, score, write, write_lines

KINDS = ["colour", "colour", "shape", "shape"]
QUESTIONS = [
    {"id": f"q{n}", "question": "which?", "answer": "red", **({"kind": kind} if kind else {})}
    for n, kind in enumerate([*KINDS, None])
]
Capture = pytest.CaptureFixture[str]


def files(folder: Path, *answers: str, name: str = "predictions.jsonl") -> tuple[Path, Path]:
    said = [{"id": f"q{n}", "answer": answer} for n, answer in enumerate(answers)]
    return write_lines(folder / name, said), write_lines(folder / "questions.jsonl", QUESTIONS)


def test_json_is_printed_alone(tmp_path: Path, capsys: Capture) -> None:
    paths = files(tmp_path, "red", "Red.", "red", "blue", "red")
    metrics = {"accuracy": 0.6, "accuracy/colour": 0.5, "accuracy/shape": 0.5}
    code, out, err = score(capsys, "exact", *paths, "--json", "--bootstrap", 0)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"task": "exact", "mode": "official", "n": 5, "metrics": metrics}
    code, out, err = score(capsys, "exact", *paths, "--json", "--per-item", "--mode", "normalised")
    told = json.loads(out)
    assert (code, err, told["mode"]) == (0, "", "normalised")
    assert told["per_item"] == {"q0": 1, "q1": 1, "q2": 1, "q3": 0, "q4": 1}
    assert set(told["intervals"]) == set(told["metrics"]) == set(metrics)
    low, high = told["intervals"]["accuracy"]
    assert 0 < low < told["metrics"]["accuracy"] < high <= 1


def test_intervals_follow_the_seed_and_the_number_of_draws(tmp_path: Path, capsys: Capture) -> None:
    questions = write_lines(tmp_path / "questions.jsonl", [{**QUESTIONS[4], "id": n} for n in range(300)])
    rows = [{"id": n, "answer": "red" if n % 3 else "blue"} for n in range(300)]
    paths = write_lines(tmp_path / "predictions.jsonl", rows), questions

    def interval(*options: Any) -> Any:
        return json.loads(score(capsys, "exact", *paths, "--json", *options)[1])["intervals"]

    assert interval() == interval("--seed", 0) == interval("--bootstrap", 1000)
    assert interval() != interval("--seed", 1)
    assert interval() != interval("--bootstrap", 50)


def test_people_are_told_the_task_the_mode_and_the_number_of_questions(tmp_path: Path, capsys: Capture) -> None:
    paths = files(tmp_path, "red", "blue", "red", "blue", "red")
    code, out, _ = score(capsys, "exact", *paths, "--bootstrap", 0)
    assert code == 0
    assert out.splitlines()[0] == "exact, mode official, n = 5"
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["accuracy", "0.6000"],
        ["accuracy/colour", "0.5000"],
        ["accuracy/shape", "0.5000"],
    ]
    _, out, _ = score(capsys, "exact", *paths)
    assert out.splitlines()[1].split() == ["accuracy", "0.6000", "[0.2000,", "1.0000]"]
    assert out.splitlines()[-1] == "in brackets: 95 % intervals, 1000 draws of the items with replacement (seed 0)"


def test_two_runs_are_compared_item_by_item(tmp_path: Path, capsys: Capture) -> None:
    ours, questions = files(tmp_path, "red", "red", "red", "blue", "red")
    theirs, _ = files(tmp_path, "blue", "red", "red", "red", "blue", name="theirs.jsonl")
    code, out, err = score(capsys, "exact", ours, questions, "--against", theirs, "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["metrics"]["accuracy"] == 0.8
    against = told["against"]
    assert against["predictions"] == str(theirs)
    accuracy = against["metrics"]["accuracy"]
    assert (accuracy["ours"], accuracy["theirs"]) == (0.8, 0.6)
    assert accuracy["difference"] == pytest.approx(0.2)
    assert accuracy["interval"][0] < 0.2 < accuracy["interval"][1]
    assert against["changed"] == {"q0": [1, 0], "q4": [1, 0], "q3": [0, 1]}
    assert list(against["changed"])[-1] == "q3"  # gains come first, losses last
    _, out, _ = score(capsys, "exact", ours, questions, "--against", theirs)
    assert "items that changed: 3, 2 better, 1 worse" in out
    assert "  q3: 0, against 1" in out
    _, out, _ = score(capsys, "exact", ours, questions, "--against", theirs, "--json", "--bootstrap", 0)
    assert "interval" not in json.loads(out)["against"]["metrics"]["accuracy"]


def test_partial_predictions_are_counted_and_compared_where_both_answer(tmp_path: Path, capsys: Capture) -> None:
    ours, questions = files(tmp_path, "red", "red", "red", "blue")
    theirs, _ = files(tmp_path, "red", "blue", name="theirs.jsonl")
    ours.write_text(ours.read_text() + '{"id": "q0", "answer": "x"}\n{"id": "q9", "answer": "x"}\nnonsense\n')
    code, out, err = score(capsys, "exact", ours, questions, "--json")
    assert (code, out) == (1, "")
    assert "1 rows can't be used (line 7: an object is needed, not invalid JSON); 1 ids come more than once (q0)" in err
    assert "1 questions of" in err
    assert "(q4); 1 ids are not in" in err
    code, out, _ = score(capsys, "exact", ours, questions, "--json", "--allow-partial", "--per-item")
    told = json.loads(out)
    assert (code, told["n"]) == (0, 4)
    assert told["left_out"] == {"broken": 1, "repeated": 1, "missing": 1, "unknown": 1}
    assert told["per_item"] == {"q0": 1, "q1": 1, "q2": 1, "q3": 0}  # the first of two answers stays
    _, out, _ = score(capsys, "exact", ours, questions, "--allow-partial")
    assert 'left_out: {"broken": 1, "repeated": 1, "missing": 1, "unknown": 1}' in out
    _, out, _ = score(capsys, "exact", ours, questions, "--json", "--allow-partial", "--against", theirs)
    told = json.loads(out)
    assert (told["n"], told["metrics"]["accuracy"]) == (2, 1)
    assert told["left_out_of_other"] == {"broken": 0, "repeated": 0, "missing": 3, "unknown": 0}
    other, _ = files(tmp_path, name="other.jsonl")
    write_lines(other, [{"id": "q4", "answer": "red"}])
    code, _, err = score(capsys, "exact", ours, questions, "--allow-partial", "--against", other)
    assert code == 1
    assert "no question that both answer" in err
    write_lines(other, [{"id": "q7", "answer": "red"}])
    code, _, err = score(capsys, "exact", other, questions, "--allow-partial")
    assert code == 1
    assert "no prediction fits" in err


ROWS = {
    "exact": QUESTIONS[:1],
    "pope": [{"question_id": 1, "label": "yes"}],
}
OBJECTS = {
    "vqav2": {"annotations": [annotation(1, ["red"] * 10)]},
    "textvqa": {"data": [{"question_id": 1, "answers": ["red"] * 10}]},
    "vizwiz": [{"image": "1", "answers": [{"answer": "red"}] * 10}],
    "coco-caption": {"annotations": [{"image_id": 1, "caption": "a dog"}]},
    "gqa": {"1": {"answer": "red"}},
    "scienceqa": {"1": {"question": "?", "choices": ["x", "y"], "answer": 0}},
}
TABLES = {"mmbench": "index\tquestion\tA\tB\tanswer\n1\t?\tx\ty\tA\n"}


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "no such"),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "blank": (lambda path: path.write_bytes(b"\xef\xbb\xbf \r\n\n"), ""),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 9), ""),
    "folder": (folder, ""),
    "broken": (lambda path: path.write_text('{"a": [1, 2'), ""),
    "deep": (lambda path: path.write_text("[" * 200_000), ""),
    "deep object": (lambda path: path.write_text('{"annotations":' * 100_000), ""),
    "a number": (lambda path: path.write_text("3"), ""),
    "no rows": (lambda path: path.write_text("[]"), ""),
    "NaN": (lambda path: path.write_text('[{"question_id": NaN, "answer": NaN}]'), ""),
    "long number": (lambda path: path.write_text('[{"question_id": ' + "9" * 9999 + ', "answer": "x"}]'), ""),
}


@pytest.mark.parametrize("which", ["predictions", "references"])
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("task", [*ROWS, *OBJECTS, *TABLES])
def test_what_cannot_be_scored_is_one_sentence_and_exit_1(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, task: str, spoilt: str, which: str
) -> None:
    monkeypatch.setattr("data.benchmarks.java.missing", lambda: "this takes seconds")
    ids = {"exact": "id", "vizwiz": "image", "coco-caption": "image_id", "gqa": "questionId"}
    texts = {"coco-caption": "caption", "gqa": "prediction"}
    said = {ids.get(task, "question_id"): "q0" if task == "exact" else "1", texts.get(task, "answer"): "yes"}
    paths = {"predictions": write(tmp_path / "predictions.json", [said])}
    if task in ROWS:
        paths["references"] = write_lines(tmp_path / "references.jsonl", ROWS[task])
    elif task in TABLES:
        paths["references"] = tmp_path / "references.tsv"
        paths["references"].write_text(TABLES[task])
    else:
        paths["references"] = write(tmp_path / "references.json", OBJECTS[task])
    code, out, _ = score(capsys, task, *paths.values(), "--json", "--bootstrap", 2)
    assert (code, json.loads(out)["n"]) == (0, 1)
    spoil, complaint = SPOILT[spoilt]
    spoil(paths[which])
    code, out, err = score(capsys, task, *paths.values(), "--json")
    assert (code, out) == (1, "")
    assert err.startswith("vlm score: ")
    assert len(err.splitlines()) == 1
    assert len(err) < 1000
    assert str(paths[which]) in err
    assert complaint in err


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_other_line_ends_and_byte_order_marks_are_read(tmp_path: Path, capsys: Capture, ending: str) -> None:
    paths = files(tmp_path, "red", "red", "red", "red", "red")
    for path in paths:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", ending.encode()))
    assert json.loads(score(capsys, "exact", *paths, "--json")[1])["metrics"]["accuracy"] == 1
    vqa = (
        write(tmp_path / "p.json", [{"question_id": 1, "answer": "red"}]),
        write(tmp_path / "r.json", OBJECTS["vqav2"]),
    )
    for path in vqa:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b", ", b"," + ending.encode()))
    assert json.loads(score(capsys, "vqav2", *vqa, "--json")[1])["metrics"]["accuracy"] == 100


def test_options_that_do_not_fit_the_task_are_refused(tmp_path: Path, capsys: Capture) -> None:
    paths = files(tmp_path, "red", "red", "red", "red", "red")
    for task, options, complaint in (
        ("exakt", [], "unknown task 'exakt'"),
        ("exact", ["--tokenizer", "none"], "--tokenizer is for captions"),
        ("pope", ["--mode", "normalised"], "pope is scored in the mode official, not normalised"),
    ):
        code, out, err = score(capsys, task, *paths, *options)
        assert (code, out) == (1, "")
        assert complaint in err
