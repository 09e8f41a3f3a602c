"""VizWiz against its program written out: annotators by position, photographs by name or number, its files."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.benchmarks.files import check_pictures
from data.benchmarks.vizwiz import VizWiz, unanswerable
from data.benchmarks.vqa import VQA
from tests.data.benchmarks.files import picture, score, write, write_lines
from tests.data.benchmarks.official_vqa import Script
from tests.data.benchmarks.test_vqa_official import text
from vlm import UserError


def photo(name: str, answers: list[str], sure: str = "yes", **more: Any) -> dict[str, Any]:
    told = [{"answer": answer, "answer_confidence": sure} for answer in answers]
    return {"image": name, "question": "what?", "answers": told, "answer_type": "other", "answerable": 1, **more}


class Official:
    """VizWiz's program, written out: the prediction is always normalised, the annotators' answers never, and one of
    them is left out by its position."""

    def __init__(self) -> None:
        self.script = Script([], [])

    def score(self, said: str, answers: list[dict[str, Any]]) -> float:
        said = self.script.words(self.script.punctuation(self.script.trim(said)))
        accuracies = []
        for place, _ in enumerate(answers):
            others = [answer for other, answer in enumerate(answers) if other != place]
            accuracies.append(min(1, float(len([one for one in others if one["answer"] == said])) / 3))
        return 100 * float(sum(accuracies)) / len(accuracies)


def test_every_photograph_scores_as_in_the_official_loop(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows, said, expected = [], [], {}
    for number in range(1500):
        pool = [text(rng) for _ in range(rng.choice([1, 2, 4]))] + ["red", "Red", " red", "it's", "2"]
        name = f"VizWiz_val_{number:08}.jpg"
        row = photo(name, rng.choices(pool[: rng.randint(1, len(pool))], k=10), answer_type=rng.choice("ab"))
        for answer in row["answers"]:
            answer["answer_confidence"] = rng.choice(["yes", "yes", "maybe", "no"])
        rows.append(row)
        answer = rng.choice([rng.choice(row["answers"])["answer"], text(rng), "RED.", "two", "its"])
        said.append({"image": name, "answer": answer})
        expected[name] = Official().score(answer, row["answers"])
    scores = VizWiz().score_files(write(tmp_path / "said.json", said), write(tmp_path / "val.json", rows))
    assert scores.per_item == pytest.approx(expected)
    assert len(set(scores.per_item.values())) > 4
    assert scores.metrics["accuracy"] == pytest.approx(sum(expected.values()) / 1500)
    for kind in "ab":
        some = [expected[row["image"]] for row in rows if row["answer_type"] == kind]
        assert scores.metrics[f"accuracy/{kind}"] == pytest.approx(sum(some) / len(some))


@pytest.mark.parametrize("sure", ["yes", "maybe"])
@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_annotators_are_left_out_by_position(tmp_path: Path, agreeing: int, expected: float, sure: str) -> None:
    """Ten equal answers of equal confidence agree, as do four; what they hold besides makes no difference."""
    answers = ["red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    references = write(tmp_path / "val.json", [photo("a.jpg", answers, sure)])
    for answer in ("red", "Red.", "the RED"):  # the prediction is normalised, whoever agrees
        said = write(tmp_path / "said.json", [{"image": "a.jpg", "answer": answer}])
        scores = VizWiz().score_files(said, references)
        assert scores.metrics == {"accuracy": pytest.approx(expected), "accuracy/other": pytest.approx(expected)}
        assert VizWiz().score_files(said, references, "normalised").metrics == scores.metrics


def test_annotators_answers_are_compared_as_they_are_published(tmp_path: Path) -> None:
    references = write(tmp_path / "val.json", [photo("a.jpg", ["Red"] * 10), photo("b.jpg", ["two"] * 10)])
    said = write(tmp_path / "said.json", [{"image": "a.jpg", "answer": "Red"}, {"image": "b.jpg", "answer": "two"}])
    assert VizWiz().score_files(said, references).per_item == {"a.jpg": 0, "b.jpg": 0}
    assert VizWiz().score_files(said, references, "normalised").per_item == {"a.jpg": 100, "b.jpg": 100}


def in_vqas_form(names: list[str]) -> dict[str, Any]:
    """As OpenFlamingo publishes VizWiz: numbered questions, no ids of annotators, no answer type."""
    rows = []
    for number, name in enumerate(names):
        row = photo(name, [f"w{number}"] * 10)
        rows.append({"question_id": number, "image_id": name, "question_type": "other", "answers": row["answers"]})
    return {"annotations": rows}


NAMES = [f"VizWiz_val_{number:08}.jpg" for number in range(12)]


@pytest.mark.parametrize("form", ["vizwiz", "vqa"])
@pytest.mark.parametrize("key", ["image", "question_id", "number", "text"])
def test_photographs_are_named_or_numbered(tmp_path: Path, form: str, key: str) -> None:
    rows: Any = [photo(name, [f"w{n}"] * 10) for n, name in enumerate(NAMES)]
    references = write(tmp_path / "val.json", rows if form == "vizwiz" else in_vqas_form(NAMES))
    ids = {"image": "image"}.get(key, "question_id")
    said = [
        {ids: n if key in ("number", "text") else name, "text" if key == "text" else "answer": f"W{n}"}
        for n, name in enumerate(NAMES)
    ]
    scores = VizWiz().score_files(write_lines(tmp_path / "said.jsonl", said), references)
    assert set(scores.per_item) == ({*NAMES} if form == "vizwiz" else {str(n) for n in range(12)})
    assert set(scores.per_item.values()) == {100}
    twice = [*said, {"image": NAMES[3], "answer": "x"}]
    with pytest.raises(UserError, match="1 ids come more than once"):
        VizWiz().score_files(write_lines(tmp_path / "said.jsonl", twice), references)
    with pytest.raises(UserError, match=r"1 ids are not in .*val\.json \(VizWiz_val_00000077\.jpg\)"):
        VizWiz().score_files(
            write_lines(tmp_path / "said.jsonl", [*said, {"image": "VizWiz_val_00000077.jpg", "answer": ""}]),
            references,
        )


def test_files_in_vqas_form_are_asked_and_scored_by_both_rules(tmp_path: Path) -> None:
    write(tmp_path / "val_annotations_vqa_format.json", in_vqas_form(NAMES[:2]))
    rows = [{"question_id": n, "image_id": name, "question": f"what {n}?"} for n, name in enumerate(NAMES[:2])]
    questions = write(tmp_path / "val_questions_vqa_format.json", {"questions": rows})
    pictures = [picture(tmp_path / "val" / name) for name in NAMES[:2]]
    for benchmark in (VizWiz(), VQA()):
        folder = None if isinstance(benchmark, VizWiz) else tmp_path / "val"
        items = benchmark.items(questions, folder)
        assert [(item.id, item.question, item.image) for item in items] == [
            (str(n), f"what {n}?", image) for n, image in enumerate(pictures)
        ]
        assert {item.groups for item in items} == {("question_type/other",)}
        submitted = tmp_path / "said.json"
        submitted.write_text(benchmark.submission(items, {"0": "w0", "1": "w1"}))
        scores = benchmark.score_files(submitted, tmp_path / "val_annotations_vqa_format.json")
        # VQA's script takes ten equal answers without ids for one annotator, VizWiz's doesn't
        assert scores.metrics["accuracy"] == (100 if isinstance(benchmark, VizWiz) else 0)


def test_vizwiz_questions_meet_their_pictures(tmp_path: Path) -> None:
    write(tmp_path / "Annotations/val.json", [photo("VizWiz_val_00000000.jpg", ["x"] * 10)])
    bare = {"image": "VizWiz_test_00000000.jpg", "question": "what?"}
    write(tmp_path / "Annotations/test.json", [bare])
    val = picture(tmp_path / "val/VizWiz_val_00000000.jpg")
    test = picture(tmp_path / "test/VizWiz_test_00000000.jpg")
    (item,) = VizWiz().items(tmp_path, None, "val")
    assert (item.id, item.question, item.image) == ("VizWiz_val_00000000.jpg", "what?", val)
    assert item.references == ("x",) * 10
    (asked,) = VizWiz().items(tmp_path, None, "test")
    assert (asked.references, asked.image) == ((), test)
    assert VizWiz().items(tmp_path / "Annotations/val.json", tmp_path / "val") == [item]
    with pytest.raises(UserError, match=r"train\.json .*vizwiz\.org"):
        VizWiz().items(tmp_path, None, "train")
    val.unlink()
    with pytest.raises(UserError, match=r"1 pictures are not there \(VizWiz_val_00000000\.jpg\)"):
        check_pictures(VizWiz().items(tmp_path, None, "val"))


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"V_1.jpg": "The Red.", "V_2.jpg": "\u00fc"}
    path = tmp_path / "predictions.json"
    path.write_text(VizWiz().submission([], answers), encoding="utf-8")
    assert VizWiz().predictions(path).answers == {"V_1.jpg": "red", "V_2.jpg": "\u00fc"}
    assert set(json.loads(path.read_text())[1]) == {"image", "answer"}


def precision_by_thresholds(said: list[float], known: list[int]) -> tuple[float, float]:
    """Average precision and F1 of the unanswerable, 0 to 100: recall grows threshold by threshold, and each step counts
    with the precision there."""
    truth = [1 - one for one in known]
    scores = [1 - one for one in said]
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [wanted for score, wanted in zip(scores, truth, strict=True) if score >= threshold]
        recall = sum(taken) / sum(truth)
        total += (recall - recall_before) * sum(taken) / len(taken)
        recall_before = recall
    found = [score > 0.5 for score in scores]
    hits = sum(one and wanted for one, wanted in zip(found, truth, strict=True))
    return 100 * total, 100 * 2 * hits / max(sum(found) + sum(truth), 1)


@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 0.2, 0.5, 0.7, 1]), st.sampled_from([0, 1])), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_the_unanswerable_are_ranked_as_by_thresholds(rows: list[tuple[float, int]]) -> None:
    said, known = [row[0] for row in rows], [row[1] for row in rows]
    measures = unanswerable(np.array(said, float), np.array(known, float))
    expected = (0, 0) if all(known) else precision_by_thresholds(said, known)
    assert [float(measure) for measure in measures.values()] == pytest.approx(expected)
    for measure in measures.values():
        low, high = measure.interval(50)
        assert 0 <= low <= high <= 100
        assert measure.minus(measure).interval(50) == (0, 0)


def test_predictions_that_say_what_is_answerable_are_scored_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [photo(name, ["red"] * 10, answerable=int(n % 3 > 0)) for n, name in enumerate(NAMES)]
    references = write(tmp_path / "val.json", rows)
    sure = [n / 12 for n in range(12)]
    said: list[dict[str, Any]] = [{"image": name, "answer": "red"} for name in NAMES]
    assert "unanswerable/f1" not in VizWiz().score_files(write(tmp_path / "said.json", said), references).metrics
    for one, number in zip(said, sure, strict=True):
        one["answerable"] = number
    path = write(tmp_path / "said.json", said)
    scores = VizWiz().score_files(path, references)
    names = ["unanswerable/average_precision", "unanswerable/f1"]
    expected = precision_by_thresholds(sure, [int(n % 3 > 0) for n in range(12)])
    assert [scores.metrics[name] for name in names] == pytest.approx(expected)
    _, out, _ = score(capsys, "vizwiz", path, references, "--against", path, "--json", "--bootstrap", 20)
    told = json.loads(out)
    assert told["against"]["metrics"][names[0]]["interval"] == [0, 0]
    assert told["intervals"][names[0]][0] < expected[0] < told["intervals"][names[0]][1]
    # predictions by number find theirs, too; those of some only are not scored by it, and that is said
    numbered = [{"question_id": n, **one} for n, one in enumerate(said)]
    for one in numbered:
        del one["image"]
    scores = VizWiz().score_files(write(tmp_path / "said.json", numbered), references)
    assert [scores.metrics[name] for name in names] == pytest.approx(expected)
    del numbered[0]["answerable"]
    _, out, err = score(capsys, "vizwiz", write(tmp_path / "said.json", numbered), references, "--json")
    assert not set(names) & set(json.loads(out)["metrics"])
    assert "unanswerable is left out: 1 of 12 predictions hold no `answerable`" in err
    write(tmp_path / "said.json", [*said[1:], {**said[0], "answerable": "yes"}])
    with pytest.raises(UserError, match=r"\[11\]: answerable is a number, not 'yes'"):
        VizWiz().score_files(tmp_path / "said.json", references)
    in_form = write(tmp_path / "vqa.json", in_vqas_form(NAMES))
    scores = VizWiz().score_files(write(tmp_path / "said.json", said), in_form)
    assert scores.notes["skipped"] == {"unanswerable": "12 of 12 references hold no `answerable`"}
