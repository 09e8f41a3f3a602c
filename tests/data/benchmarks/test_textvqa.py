"""TextVQA against a port of M4C's evaluator, and its files."""

import json
import random
import re
from pathlib import Path

import pytest

from data.benchmarks.files import check_pictures
from data.benchmarks.textvqa import TextVQA
from tests.data.benchmarks.files import annotation, picture, write, write_lines
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


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"12": "a", "V_1.jpg": "\u00fc"}
    path = tmp_path / "predictions.json"
    path.write_text(TextVQA().submission([], answers), encoding="utf-8")
    assert TextVQA().predictions(path).answers == answers
    assert set(json.loads(path.read_text())[1]) == {"question_id", "answer"}


SUFFIX = "Answer the question using a single word or phrase."
PROMPTS = {
    "behind": "{question}\nReference OCR token: a, b\n" + SUFFIX,
    "before": "Reference OCR token: a, b\n{question}\n" + SUFFIX,
    "none": "{question}\n" + SUFFIX,
    "old": "OCR tokens: a, b. Question: {question} Short answer:",
}


@pytest.mark.parametrize("form", PROMPTS)
def test_llavas_answers_name_the_picture_and_hold_the_prompt(tmp_path: Path, form: str) -> None:
    """Its script finds the question by both, case apart."""
    asked = [("p", "What is it?"), ("p", "what Brand?"), ("q", "what is it?"), ("q", "what is it?")]
    rows = [
        {"question_id": 70 + n, "image_id": image, "question": question, "answers": [f"w{n}"] * 10}
        for n, (image, question) in enumerate(asked)
    ]
    references = write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    said = [
        {"question_id": image, "prompt": PROMPTS[form].format(question=question.upper()), "text": f"W{n}."}
        for n, (image, question) in enumerate(asked)
    ]
    scores = TextVQA().score_files(write_lines(tmp_path / "said.jsonl", said), references)
    assert scores.per_item == {"70": 100, "71": 100, "72": 100, "73": 100}
    by_question = [{**row, "question_id": 70 + n} for n, row in enumerate(said)]
    scores = TextVQA().score_files(write_lines(tmp_path / "said.jsonl", by_question), references)
    assert set(scores.per_item.values()) == {100}
    more = [*by_question, by_question[1], {**said[0], "prompt": "who?"}]
    path = write_lines(tmp_path / "said.jsonl", more)
    with pytest.raises(UserError, match=r"1 ids come more than once \(71\); 1 ids are not in .* \(p\)"):
        TextVQA().score_files(path, references)


def test_annotations_in_vqas_form_are_scored_by_textvqas_rules(tmp_path: Path) -> None:
    row = annotation(5, ["Joe's"] * 9 + ["joe"])
    del row["answer_type"]
    references = write(tmp_path / "val_annotations_vqa_format.json", {"annotations": [row]})
    said = write(tmp_path / "said.json", [{"question_id": 5, "answer": "JOE'S?"}])
    assert TextVQA().score_files(said, references).per_item == {"5": 100}
    asked = {"question_id": 5, "image_id": "003a8ae2ef43b901", "question": "whose?"}
    questions = write(tmp_path / "val_questions_vqa_format.json", {"questions": [asked]})
    image = picture(tmp_path / "train_images/003a8ae2ef43b901.jpg")
    (item,) = TextVQA().items(questions, None)
    assert (item.id, item.question, item.image) == ("5", "whose?", image)
    assert TextVQA().score([item], {"5": "joe's"}).metrics == {"accuracy": 100, "question_type/what": 100}
