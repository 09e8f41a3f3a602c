"""MMBench: its tables, their pictures, rows and circles scored as a plain reading of the rules does, submissions."""

import base64
import csv
import io
import json
import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.benchmarks.mmbench import MMBench, make_item
from data.pictures import ImageRow, MissingImage, image_size, load_image
from tests.data.benchmarks.files import score, write, write_lines
from vlm import UserError

NAMES = "index question hint A B C D answer category image source l2-category comment split".split()


def picture(width: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, 9), (width, 90, 200)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def row(index: Any, **more: Any) -> dict[str, Any]:
    plain = {"index": index, "question": "Which?", "A": "x", "B": "y", "answer": "A", "image": picture(20)}
    return {**plain, "category": "ocr", "l2-category": "perception", "split": "dev", **more}


def table(path: Path, rows: Sequence[dict[str, Any]], end: str = "\n", names: Sequence[str] = NAMES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, "excel-tab", lineterminator=end)
        writer.writerow(names)
        writer.writerows([one.get(name, "") for name in names] for one in rows)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_are_asked_as_llava_asks_them(tmp_path: Path, end: str, mark: bytes) -> None:
    rows = [
        row(7, hint='He said:\n"a\tb"', question="What's\n'this'?", C="one, two", D="\u00fcber", answer="D"),
        row(8, hint="nan", C="nan", D="", answer="B", image=picture(30), category="nan"),
        row(1_000_007, hint="None", B="None", C="z", answer="C", image="7"),
        row(1_000_008, A="None", image=picture(30)),
        row(9, image="1000007"),
    ]
    path = table(tmp_path / "mmbench_dev_20230712.tsv", rows, end)
    path.write_bytes(mark + path.read_bytes())
    items = MMBench().items(path, None)
    assert [item.id for item in items] == ["7", "8", "1000007", "1000008", "9"]
    assert items[0].question == ("He said:\n\"a\tb\"\nWhat's\n'this'?\nA. x\nB. y\nC. one, two\nD. \u00fcber")
    assert items[1].question == "Which?\nA. x\nB. y"
    assert items[2].question == "Which?\nA. x\nC. z"
    assert items[3].question == "Which?\nA. None\nB. y"  # an answer is there, whatever it is called
    assert [item.references for item in items] == [("D",), ("B",), ("C",), ("A",), ("A",)]
    assert [MMBench().choices(item) for item in items[:3]] == [("A", "B", "C", "D"), ("A", "B"), ("A", "C")]
    assert items[0].groups == ("category/ocr", "l2-category/perception")
    assert items[1].groups == ("l2-category/perception",)
    images = [item.image for item in items]
    assert [image_size(image) for image in images[:4] if image] == [(9, 20), (9, 30), (9, 20), (9, 30)]
    assert images[0] == images[2]
    assert images[1] == images[3] != images[0]
    with pytest.raises(UserError, match=r"dev_20230712\.tsv:\d+: its image is that of row 1000007, which holds none"):
        load_image(images[4])  # type: ignore[arg-type]
    assert MMBench.prompt == "{question}\nAnswer with the option's letter from the given choices directly."
    assert [replace(item, image=None) for item in items] == MMBench().references(path)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("", "no image in it"),
        ("nan", "no image in it"),
        ("77", "its image is that of row 77, which holds none"),
        ("not base64!", "its image is no base64"),
        (picture(20)[:-3], "its image is no base64"),
        (f"{picture(20)[:40]}!{picture(20)[40:]}", "its image is no base64"),
        (base64.b64encode(b"no picture " * 9).decode(), "image"),
        ("1" * 5000, "image"),
    ],
)
def test_a_broken_picture_fails_its_question_only(tmp_path: Path, image: str, complaint: str) -> None:
    path = table(tmp_path / "mmbench.tsv", [row(1), row(2, image=image), row(3)])
    first, broken, last = (item.image for item in MMBench().items(path, None))
    assert isinstance(broken, MissingImage if image in ("", "nan", "77") else ImageRow)
    assert load_image(first).size == load_image(last).size == (20, 9)  # type: ignore[arg-type]
    assert first == last != broken
    with pytest.raises(UserError, match=rf"mmbench\.tsv:3.*{complaint}"):
        load_image(broken)


def test_pictures_are_not_held(tmp_path: Path) -> None:
    noise = random.Random(0)
    rows = [row(n, image=base64.b64encode(noise.randbytes(100_000)).decode()) for n in range(100)]
    path = table(tmp_path / "mmbench.tsv", rows)
    tracemalloc.start()
    try:
        items = MMBench().items(path, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len({item.image for item in items}) == 100
    assert items[5].image is not None
    assert base64.b64encode(items[5].image.read()).decode() == rows[5]["image"]  # type: ignore[union-attr]
    assert peak < path.stat().st_size / 4


def test_rows_that_are_not_mmbenchs_are_named(tmp_path: Path) -> None:
    rows = [
        row("x"),
        row("", answer="A"),
        row(2),
        row(3, answer="C"),
        row(4, question="nan"),
        row(5, A="", B="nan"),
        row(6, answer="B", B=""),
        row(7, answer="yes"),
    ]
    with pytest.raises(UserError) as stopped:
        MMBench().references(table(tmp_path / "mmbench.tsv", rows))
    assert str(stopped.value) == (
        f"{tmp_path}/mmbench.tsv: 7 rows can't be read (line 2: index is a whole number, not 'x', line 3: index is a "
        "whole number, not '', line 5: answer 'C', where the options are A, B, line 6: no question, line 7: no options,"
        " ...)"
    )
    path = table(tmp_path / "mmbench.tsv", [row(2), row(3)])
    path.write_bytes(path.read_bytes() + b"4\tWhich?\n")
    with pytest.raises(UserError, match=r"1 rows can't be read \(line 4: 2 values, where the header names 14 columns"):
        MMBench().references(path)
    with pytest.raises(UserError, match=r"1 ids come more than once \(3\)"):
        MMBench().score_files(
            write(tmp_path / "p.json", [{"index": 2, "text": "A"}]), table(path, [row(3), row(2), row("03")])
        )
    with pytest.raises(UserError, match=r"mmbench\.tsv:1: MMBench's table has no column index, A here"):
        MMBench().references(table(path, [row(1)], names=["question", "answer", "B"]))
    without = [name for name in NAMES if name != "image"]
    assert len(MMBench().references(table(path, [row(1)], names=without))) == 1
    with pytest.raises(UserError, match="no column image"):
        MMBench().items(path, None)
    with pytest.raises(ValueError, match="A is text, not 3"):
        make_item(row(1, A=3), None)


def test_files_are_found_by_name_and_split(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not there: mmbench_dev_20230712\.tsv\. .*github\.com/open-compass/MMBench"):
        MMBench().items(tmp_path / "empty", None)
    table(tmp_path / "all/MMBench_DEV_EN.tsv", [row(1)])
    table(tmp_path / "all/mmbench_test_en_20231003.tsv", [row(2, answer="")])
    (tmp_path / "all/other.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match=r"several files fit \(MMBench_DEV_EN\.tsv, mmbench_test_en_20231003\.tsv\)"):
        MMBench().items(tmp_path / "all", None)
    assert [item.id for item in MMBench().items(tmp_path / "all", None, "dev")] == ["1"]
    (asked,) = MMBench().items(tmp_path / "all", None, "test")
    assert (asked.id, asked.references) == ("2", ())
    with pytest.raises(UserError, match=r"1 of 1 rows have no answer \(2\), as in test splits"):
        MMBench().references(tmp_path / "all/mmbench_test_en_20231003.tsv")


def circles(seed: int) -> tuple[list[dict[str, Any]], dict[str, str | None], dict[str, str]]:
    """Rows of questions with their choices turned, the letter that each was answered with, and in which words."""
    rng = random.Random(seed)
    rows, letters, said = [], dict[str, str | None](), dict[str, str]()
    for question in rng.sample(range(3000), 40):
        count, clever = rng.randrange(2, 5), rng.random()
        texts, answer = [f"choice {n}" for n in range(count)], rng.randrange(count)
        category = rng.choice(["ocr", "counting", "style"])
        for turn in range(count if rng.random() < 0.9 else 1):
            options = {"ABCD"[(n + turn) % count]: text for n, text in enumerate(texts)}
            right = "ABCD"[(answer + turn) % count]
            rows.append(row(question + turn * 1_000_000, answer=right, category=category, **{"B": "", **options}))
            letter = right if rng.random() < clever else rng.choice([*options, None])
            letters[str(rows[-1]["index"])] = letter
            ways = [letter, f"{letter}.", f"({letter})", f"{letter}. {options[letter]}"] if letter else ["", "Z", "no"]
            said[str(rows[-1]["index"])] = rng.choice([way for way in ways if way is not None])
    rng.shuffle(rows)
    return rows, letters, said


def mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_rules(tmp_path: Path, seed: int) -> None:
    rows, letters, said = circles(seed)
    path = table(tmp_path / "mmbench_dev.tsv", rows)
    predictions = write(tmp_path / "p.json", [{"index": int(i), "prediction": text} for i, text in said.items()])
    scores = MMBench().score_files(predictions, path)
    right = {str(one["index"]): letters[str(one["index"])] == one["answer"] for one in rows}
    asked = {one["index"]: one for one in rows if one["index"] < 1_000_000}
    hit = {n: all(right[str(one["index"])] for one in rows if one["index"] % 1_000_000 == n) for n in asked}
    expected = {"accuracy": mean(list(right.values())), "circular": mean(list(hit.values()))}
    for kind in ("category", "l2-category"):
        for name in {one[kind] for one in rows}:
            expected[f"{kind}/{name}"] = mean([hit[n] for n, one in asked.items() if one[kind] == name])
    assert scores.metrics == pytest.approx(expected)
    assert 0 < expected["circular"] < expected["accuracy"] < 1
    assert scores.per_item == right
    assert list(scores.per_item) == [str(one["index"]) for one in rows]
    missed = {name for name, letter in letters.items() if letter is None}
    assert {one["id"] for one in scores.notes["unparsed_answers"]} == missed
    assert (scores.notes["unparsed"], scores.notes["questions"]) == (len(missed), 40)
    turns = {n: sum(one["index"] % 1_000_000 == n for one in rows) for n in asked}
    short = [n for n, one in asked.items() if turns[n] < sum(bool(one.get(letter)) for letter in "ABCD")]
    assert scores.notes["circles_cut_short"] == len(short) > 0
    assert {len(scores.measures[name].statistics) for name in ("accuracy", "circular")} == {40}  # questions are drawn
    # without circles a question is its row
    single = MMBench().score([make_item(one, None) for one in asked.values()], said)
    assert "circular" not in single.metrics
    assert "questions" not in single.notes
    assert single.metrics["accuracy"] == pytest.approx(mean([right[str(n)] for n in asked]))
    assert single.metrics["l2-category/perception"] == single.metrics["accuracy"]


def test_categories_are_those_of_the_questions_own_row() -> None:
    items = [make_item(row(1_000_004, category="turned"), None), make_item(row(4), None)]
    assert set(MMBench().score(items, {"1000004": "A", "4": None}).metrics) == {
        "accuracy",
        "circular",
        "category/ocr",
        "l2-category/perception",
    }


def test_letters_of_missing_options_and_failures() -> None:
    item = make_item(row(1, B="", C="z", answer="C"), None)
    for answer, right, unparsed in (("C", 1, 0), ("z", 1, 0), ("B", 0, 1), ("", 0, 1), (None, 0, 0), ("A", 0, 0)):
        scores = MMBench().score([item], {"1": answer})
        assert (scores.metrics["accuracy"], scores.notes["unparsed"]) == (right, unparsed)


ANSWERS = {"1": "A", "2": 'he said "B"\tor\n"C"', "1000001": "B. y", "3": ""}


@pytest.mark.parametrize("form", ["list", "lines", "tsv", "csv", "submission"])
def test_predictions_are_read_in_every_form(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1, hint="look\tthere", C="4"), row(2), row(1_000_001, answer="B"), row(3, A="nan", answer="B")]
    path = table(tmp_path / "mmbench_dev.tsv", rows)
    items = MMBench().items(path, None)
    predictions = tmp_path / f"predictions.{'tsv' if form == 'submission' else form}"
    if form == "list":
        write(predictions, [{"index": int(i), "prediction": text, "answer": "x"} for i, text in ANSWERS.items()])
    elif form == "lines":
        write_lines(predictions, [{"question_id": int(i), "text": text, "options": []} for i, text in ANSWERS.items()])
    elif form == "submission":
        predictions.write_text(MMBench().submission(items, ANSWERS), encoding="utf-8")
        with predictions.open(encoding="utf-8", newline="") as file:
            told = list(csv.DictReader(file, dialect="excel-tab"))
        assert list(told[0]) == [
            *("index", "question", "hint", "A", "B", "C", "D", "answer"),
            *("category", "l2-category", "source", "split", "prediction"),
        ]
        assert [one["prediction"] for one in told] == list(ANSWERS.values())
        assert [one["A"] for one in told] == ["x", "x", "x", ""]
        assert (told[0]["hint"], told[2]["index"], told[2]["split"]) == ("look\tthere", "1000001", "dev")
    else:
        with predictions.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, "excel-tab" if form == "tsv" else "excel")
            writer.writerows([["answer", "prediction", "index"], *(["A", text, i] for i, text in ANSWERS.items())])
    assert MMBench().predictions(predictions).answers == ANSWERS
    code, out, _ = score(capsys, "mmbench", predictions, path, "--json", "--per-item", "--bootstrap", 20)
    told = json.loads(out)
    assert (code, told["per_item"]) == (0, {"1": 1, "2": 0, "1000001": 1, "3": 0})
    assert (told["metrics"]["accuracy"], told["metrics"]["circular"]) == pytest.approx((0.5, 1 / 3))
    assert [one["id"] for one in told["unparsed_answers"]] == ["2", "3"]
    code, out, _ = score(capsys, "mmbench", predictions, path, "--against", predictions)
    assert (code, "items that changed: 0" in out) == (0, True)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.xlsx", "PK", "a spreadsheet; save it as a table of text"),
        ("p.tsv", "", "no rows in it"),
        ("p.tsv", "index\tprediction\n", "no rows in it"),
        ("p.tsv", "index\tprediction\n1\tA\tB\n", r"p\.tsv:2: more values than the header's 2 columns"),
        ("p.tsv", 'index\tprediction\n1\t"A\n', r"p\.tsv:1: not a row of a table"),
        ("p.csv", "index,prediction\n1\n2,A\n2,A\n5,A\n", r"1 rows can't be used \(line 2: prediction is text, not no"),
        ("p.csv", "index,prediction\n2,A\n2,A\n5,A\n", r"1 ids come .* \(2\); 1 .*no prediction \(1\); 1 .* \(5\)"),
        ("p.csv", "number,prediction\n1,A\n", r"line 2: index is a number or text, not nothing"),
    ],
)
def test_predictions_that_do_not_fit_are_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = table(tmp_path / "mmbench_dev.tsv", [row(1), row(2)])
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        MMBench().score_files(tmp_path / name, path)
