"""TextVQA against a port of M4C's evaluator; VizWiz, whose annotators have no ids."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks.files import check_pictures
from data.benchmarks.ten_answers import TextVQA, VizWiz
from tests.data.benchmarks.files import picture, write
from tests.data.benchmarks.official_vqa import Script
from tests.data.benchmarks.test_vqa_official import text
from vlm import UserError


class M4C:
    """The evaluator of M4C: EvalAI's processing, then each annotator against the nine others by position."""

    def __init__(self) -> None:
        self.script = Script([], [])
        self.script.comma = re.compile(r"(?<=\d)(\,)+(?=\d)")

    def process(self, answer: str) -> str:
        answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        return self.script.words(self.script.punctuation(self.script.trim(answer)))

    def score(self, said: str, raw: list[str]) -> float:
        answers = list(enumerate(map(self.process, raw)))
        scores = {}
        for unique in {answer for _, answer in answers}:
            accuracies = []
            for one in answers:
                others = [other for other in answers if other != one]
                accuracies.append(min(1, len([other for other in others if other[1] == unique]) / 3))
            scores[unique] = sum(accuracies) / len(accuracies)
        return scores.get(self.process(said), 0.0)


def test_textvqa_scores_as_m4c_does(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows, said, expected = [], [], {}
    for number in range(1500):
        pool = [text(rng) for _ in range(rng.choice([1, 2, 4, 10]))] + ["Joe's", "joe 's", "1,000", "who?"]
        answers = rng.choices(pool[: rng.randint(1, len(pool))], k=10)
        answer = rng.choice([*answers, text(rng), "Joe's cafe", answers[0].upper()])
        rows.append({"question_id": number, "image_id": "x", "question": "?", "answers": answers})
        said.append({"question_id": number, "answer": answer})
        expected[str(number)] = 100 * M4C().score(answer, answers)
    references = write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    scores = TextVQA().score_files(write(tmp_path / "said.json", said), references)
    assert scores.per_item == expected
    assert len(set(expected.values())) > 4
    assert scores.metrics["accuracy"] == pytest.approx(sum(expected.values()) / 1500)
    assert scores.notes == {}  # whoever asked may have shown OCR tokens
    failed = TextVQA().score(TextVQA().references(references), dict.fromkeys(expected))
    assert set(failed.per_item.values()) == {0}
    assert failed.notes == {"ocr_tokens_in_prompt": False}


def test_textvqa_normalises_where_all_agree(tmp_path: Path) -> None:
    """Unlike VQA's script."""
    references = write(tmp_path / "r.json", {"data": [{"question_id": 1, "answers": ["Yes"] * 10}]})
    scores = TextVQA().score_files(write(tmp_path / "p.json", [{"question_id": 1, "answer": "yes."}]), references)
    assert scores.metrics["accuracy"] == 100


def test_textvqa_questions_meet_their_pictures(tmp_path: Path) -> None:
    row = {"question_id": 5, "image_id": "abc", "question": "what?", "answers": ["x"] * 10, "ocr_tokens": []}
    path = write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    write(tmp_path / "TextVQA_0.5.1_test.json", {"data": [{k: v for k, v in row.items() if k != "answers"}]})
    picture(tmp_path / "train_images/abc.jpg")
    with pytest.raises(UserError, match=r"several files fit .*name one of them, or its split"):
        TextVQA().items(tmp_path, None)
    (item,) = TextVQA().items(tmp_path, None, "val")
    assert (item.id, item.question, item.references) == ("5", "what?", ("x",) * 10)
    assert item.image == tmp_path / "train_images/abc.jpg"
    assert TextVQA().items(path, tmp_path / "train_images") == [item]
    assert TextVQA().items(path, tmp_path) == [item]
    assert TextVQA().items(tmp_path, None, "test")[0].references == ()
    with pytest.raises(UserError, match=r"TextVQA_0\.5\.1_train\.json .*textvqa\.org"):
        TextVQA().items(tmp_path, None, "train")
    (tmp_path / "train_images/abc.jpg").unlink()
    with pytest.raises(UserError, match=r"pictures are not there \(abc\.jpg\)"):
        check_pictures(TextVQA().items(tmp_path, None, "val"))
    with pytest.raises(UserError, match=r"data\[0\]: .*`answers`"):
        TextVQA().references(tmp_path / "TextVQA_0.5.1_test.json")


def photo(name: str, answers: list[str], sure: str = "yes", **more: Any) -> dict[str, Any]:
    told = [{"answer": answer, "answer_confidence": sure} for answer in answers]
    return {"image": name, "question": "what?", "answers": told, "answer_type": "other", "answerable": 1, **more}


def test_vizwiz_scores_as_the_official_loop(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = []
    for number in range(1000):
        pool = [text(rng) for _ in range(rng.choice([1, 2, 4]))]
        row = photo(f"VizWiz_val_{number:08}.jpg", rng.choices(pool, k=10), answer_type=rng.choice("ab"))
        for answer in row["answers"]:
            answer["answer_confidence"] = rng.choice(["yes", "yes", "maybe", "no"])
        rows.append(row)
    said = [{"image": row["image"], "answer": rng.choice(row["answers"])["answer"]} for row in rows]
    scores = VizWiz().score_files(write(tmp_path / "said.json", said), write(tmp_path / "val.json", rows))
    named = [{**row, "question_id": row["image"], "question_type": "all"} for row in rows]
    script = Script(named, [{"question_id": one["image"], **one} for one in said])
    script.evaluate()
    assert scores.per_item == script.questions
    assert len(set(scores.per_item.values())) > 5
    expected = {f"accuracy/{kind}": value for kind, value in script.accuracy["answer_type"].items()}
    expected["accuracy"] = script.accuracy["overall"]
    assert {name: round(value, 2) for name, value in scores.metrics.items()} == expected


def test_equal_answers_in_vizwiz_exclude_one_another(tmp_path: Path) -> None:
    rows = [photo("a.jpg", ["red"] * 4 + ["blue"] * 6), photo("b.jpg", ["red"] * 10)]
    said = [{"image": "a.jpg", "answer": "red"}, {"image": "b.jpg", "answer": "red"}]
    paths = write(tmp_path / "said.json", said), write(tmp_path / "val.json", rows)
    # of ten equal answers none is left to agree; of four, six others find them
    assert VizWiz().score_files(*paths).per_item == {"a.jpg": pytest.approx(60), "b.jpg": 0}
    assert VizWiz().score_files(*paths, mode="normalised").per_item == {"a.jpg": 100, "b.jpg": 100}


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


@pytest.mark.parametrize("benchmark", [TextVQA(), VizWiz()])
def test_submissions_read_back(tmp_path: Path, benchmark: TextVQA | VizWiz) -> None:
    answers = {"12": "a", "V_1.jpg": "\u00fc"}
    path = tmp_path / benchmark.submission_name
    path.write_text(benchmark.submission([], answers), encoding="utf-8")
    assert benchmark.predictions(path).answers == answers
    assert set(json.loads(path.read_text())[1]) == {benchmark.id_keys[0], "answer"}
