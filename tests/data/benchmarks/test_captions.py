"""Captions as a benchmark: its files, both tokenisers, and published figures."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks import Item, java
from data.benchmarks.captions import Captions, Tokenizer
from data.benchmarks.files import check_pictures
from tests.data.benchmarks.files import picture, score, write
from vlm import UserError

REAL = os.environ.get("VLM_DEV_DATA", "")
NEEDS_JAVA = pytest.mark.skipif(bool(java.missing()), reason=f"no Java programs here: {java.missing()}")
NEEDS_REAL = pytest.mark.skipif(not REAL, reason="VLM_DEV_DATA names no folder with captions")
WITHOUT_JAVA = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"]
CAPTIONS = {1: ["A dog runs.", "The dog, running!"], 2: ["Two men sit.", "Men on a bench"], 30: ["A red car"]}


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "missing", lambda: "no java on this machine's PATH")


def annotations(folder: Path, split: str = "val2014") -> Path:
    rows = [
        {"id": n, "image_id": image, "caption": text}
        for n, (image, text) in enumerate((image, text) for image, texts in CAPTIONS.items() for text in texts)
    ]
    images = [{"id": image, "file_name": f"COCO_{split}_{image:012}.jpg"} for image in CAPTIONS]
    return write(folder / f"captions_{split}.json", {"info": {}, "images": images, "annotations": rows})


def said(folder: Path, *captions: str) -> Path:
    rows = [{"image_id": image, "caption": text} for image, text in zip(CAPTIONS, captions, strict=True)]
    return write(folder / "said.json", rows)


@pytest.mark.usefixtures("without_java")
def test_without_java_all_but_meteor_and_spice_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = said(tmp_path, "a dog runs", "two men sit", "a blue car"), annotations(tmp_path)
    code, out, err = score(capsys, "coco-caption", *paths, "--json", "--per-item")
    told = json.loads(out)
    assert (code, told["n"], told["mode"], told["tokenizer"]) == (0, 3, "official", "ptb-python")
    assert list(told["metrics"]) == WITHOUT_JAVA
    assert told["skipped"] == dict.fromkeys(("meteor", "spice"), "no java on this machine's PATH")
    assert err.splitlines() == [f"{name} is left out: no java on this machine's PATH" for name in ("meteor", "spice")]
    assert set(told["per_item"]) == {"1", "2", "30"}
    assert sum(told["per_item"].values()) / 3 == pytest.approx(told["metrics"]["cider"])
    assert told["metrics"]["bleu1"] == pytest.approx(8 / 9, abs=1e-6)  # blue is not among the references' words


@pytest.mark.usefixtures("without_java")
def test_none_takes_captions_for_words(tmp_path: Path) -> None:
    paths = said(tmp_path, "A dog runs.", "x", "x"), annotations(tmp_path)
    words = {name: Captions(name).score_files(*paths).metrics["bleu1"] for name in ("none", "ptb-python", "ptb")}
    assert words["none"] == words["ptb"] == words["ptb-python"]
    paths = said(tmp_path, "a dog runs", "x", "x"), paths[1]
    assert Captions("none").score_files(*paths).metrics["bleu1"] < Captions("ptb").score_files(*paths).metrics["bleu1"]


@pytest.mark.usefixtures("without_java")
def test_a_question_that_failed_is_an_empty_caption_and_counts(tmp_path: Path) -> None:
    items = Captions().references(annotations(tmp_path))
    good = {"1": "a dog runs", "2": "two men sit", "30": "a red car"}
    all_three = Captions().score(items, good)
    one_failed = Captions().score(items, {**good, "2": None})
    assert one_failed.per_item["2"] == 0
    assert one_failed.n == 3
    for name in WITHOUT_JAVA:
        assert one_failed.metrics[name] < all_three.metrics[name]
    assert Captions().score(items, dict.fromkeys(good)).metrics["cider"] == 0


@pytest.mark.usefixtures("without_java")
def test_ids_that_do_not_fit_are_named(tmp_path: Path) -> None:
    references = annotations(tmp_path)
    with pytest.raises(UserError, match=r"1 questions of .*captions_val2014\.json have no prediction \(30\)"):
        Captions().score_files(write(tmp_path / "p.json", [{"image_id": n, "caption": ""} for n in (1, 2)]), references)
    with pytest.raises(UserError, match=r"\[0\]: caption is text, not \['a'\]"):
        Captions().score_files(write(tmp_path / "p.json", [{"image_id": 1, "caption": ["a"]}]), references)
    broken = write(tmp_path / "broken.json", {"annotations": [{"image_id": 1}, {"image_id": 1, "caption": None}]})
    with pytest.raises(UserError, match=r"2 rows can't be read \(annotations\[0\]: .*, annotations\[1\]: "):
        Captions().references(broken)


def test_images_meet_their_captions_and_pictures(tmp_path: Path) -> None:
    path = annotations(tmp_path)
    for image in CAPTIONS:
        picture(tmp_path / f"val2014/COCO_val2014_{image:012}.jpg")
    items = Captions().items(tmp_path, None)
    assert [item.id for item in items] == ["1", "2", "30"]
    assert [list(item.references) for item in items] == list(CAPTIONS.values())
    assert [item.image for item in items] == [tmp_path / f"val2014/COCO_val2014_{n:012}.jpg" for n in CAPTIONS]
    assert Captions().items(path, tmp_path / "val2014") == items
    (tmp_path / "val2014/COCO_val2014_000000000030.jpg").unlink()
    with pytest.raises(UserError, match=r"1 pictures are not there \(COCO_val2014_000000000030\.jpg\)"):
        check_pictures(Captions().items(tmp_path, None))
    with pytest.raises(
        UserError, match=r"captions_train2017\.json \(of other splits there are captions_val2014\.json\)"
    ):
        Captions().items(tmp_path, None, "train2017")


def test_a_submission_reads_back(tmp_path: Path) -> None:
    answers = {"1": "a dog", "x": "caf\u00e9"}
    path = tmp_path / "s.json"
    path.write_text(Captions().submission([], answers), encoding="utf-8")
    assert Captions().predictions(path).answers == answers
    assert json.loads(path.read_text())[0] == {"image_id": 1, "caption": "a dog"}


def published(name: Tokenizer, folder: str) -> dict[str, float]:
    """Of the good captions of clipscore-example, or of nlgeval-example."""
    path = Path(REAL) / folder
    if folder.startswith("clipscore"):
        truth = json.loads((path / "example/refs.json").read_text())
        answers = json.loads((path / "example/good_captions.json").read_text())
    else:
        lines = [(path / f"examples/{file}.txt").read_text().splitlines() for file in ("hyp", "ref1", "ref2")]
        answers = {str(n): text for n, text in enumerate(lines[0])}
        truth = {str(n): both for n, both in enumerate(zip(*lines[1:], strict=True))}
    items = [Item(name, "", tuple(texts)) for name, texts in truth.items()]
    return Captions(name).score(items, answers).metrics


@NEEDS_REAL
@pytest.mark.usefixtures("without_java")
def test_the_published_figures_come_out_without_java() -> None:
    told = published("ptb-python", "clipscore-example")
    assert [round(told[name], 4) for name in ("bleu1", "rouge_l", "cider")] == [0.6667, 0.4280, 0.5637]
    assert round(published("ptb-python", "nlgeval-example")["cider"], 6) == 1.242192


@NEEDS_REAL
@NEEDS_JAVA
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_published_figures_come_out_with_java() -> None:
    told = published("ptb", "clipscore-example")
    figures = {name: round(told[name], 4) for name in ("bleu1", "meteor", "rouge_l", "cider")}
    assert figures == {"bleu1": 0.6667, "meteor": 0.3444, "rouge_l": 0.4280, "cider": 0.5637}


def raw(text: str, rng: random.Random) -> str:
    """A tokenised caption as somebody might have typed it."""
    for mark in ",.;!?":
        text = text.replace(f" {mark}", mark)
    words = text.replace(" 's", "'s").split(" ")
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(words))
        word, other = words[at], rng.choice(words)
        more = "don't it's 5:30 p.m. $5 20% 1,000 U.S. Mr. cannot o'clock #1 & 3-D t-shirt - -- 2nd 1950's".split()
        forms = [f'"{word}"', f"({word})", f"{word}'s", f"{word},", f"{word}...", f"{word}/{other}", word.upper()]
        words[at] = rng.choice([*forms, f"{word}-{other}", f"{word}!!", f"'{word}'", f"{word}'", rng.choice(more)])
    return " ".join(words)


@NEEDS_REAL
@NEEDS_JAVA
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_raw_captions_score_the_same_with_and_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 captions: the first of each picture is what was said, of 1,000 pictures with four references each."""
    rng = random.Random(0)
    lines = (Path(REAL) / "flickr8k/captions.jsonl").read_text(encoding="utf-8").splitlines()[:1000]
    rows = [[raw(text, rng) for text in json.loads(line)["captions"]] for line in lines]
    items = [Item(str(n), "", tuple(texts[1:])) for n, texts in enumerate(rows)]
    answers = {str(n): texts[0] for n, texts in enumerate(rows)}
    with_java = Captions("ptb").score(items, answers)
    assert (with_java.notes["tokenizer"], "meteor" in with_java.metrics) == ("ptb", True)
    pure = Captions("ptb-python").score(items, answers)
    assert pure.notes["tokenizer"] == "ptb-python"
    assert {name: pytest.approx(value, abs=0.005) for name, value in pure.metrics.items()} == with_java.metrics
    assert with_java.metrics["cider"] > 0.3
    words: Any = [java.tokenize(texts) for texts in zip(*rows, strict=True)]
    same = [Item(str(n), "", texts) for n, texts in enumerate(zip(*words[1:], strict=True))]
    tokenised = Captions("none").score(same, {str(n): text for n, text in enumerate(words[0])})
    assert {name: pytest.approx(value, abs=1e-6) for name, value in tokenised.metrics.items()} == with_java.metrics
