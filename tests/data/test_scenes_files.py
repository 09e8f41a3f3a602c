"""Scenes on disk: complete, the same files whoever writes them, and never half-written."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.scenes import COLOURS, HELD_OUT, PLACES, SHAPES, write_scenes
from data.scenes.questions import ask_many, names_a_place
from data.scenes.rows import heldout_item, lesson_rows, text_row, train_pair
from data.scenes.world import Thing, scene_key
from tests.data.scene_reader import answer_of, parse
from vlm.errors import UserError

SMALL = {"train": 61, "heldout": 20, "unseen": 13, "lessons": 30, "text_rows": 40, "seed": 3}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    write_scenes(out, **SMALL, processes=1)
    return out


def test_training_never_shows_or_names_what_is_held_out(written: Path) -> None:
    forbidden = [f"{colour} {shape}" for colour, shape in HELD_OUT]
    for name in ("captions.jsonl", "captions_chat.jsonl", "chat.jsonl", "lessons.jsonl", "text.jsonl"):
        text = (written / name).read_text()
        assert text
        assert not any(words in text for words in forbidden), name
    texts = " ".join(json.dumps(text_row(1, index)) for index in range(400))
    assert not any(words in texts for words in forbidden)


def test_held_out_descriptions_are_never_those_of_training(written: Path) -> None:
    def key(caption: str) -> int:
        return scene_key(tuple(sorted(parse(caption), key=lambda t: PLACES.index(t.place))))

    training = {key(row["captions"][0]) for row in lines(written / "captions.jsonl")}
    training |= {key(row["messages"][0]["content"].split(".")[0]) for row in lines(written / "text.jsonl")}
    for pair in range(1500):
        training |= {scene_key(drawn.scene) for drawn in train_pair(0, pair)}
    held = [heldout_item(seed, index)[0].scene for seed in (0, 1) for index in range(300)]
    assert not training & {scene_key(scene) for scene in held}
    assert {len(scene) for scene in held} == {1, 2, 3, 4}
    assert not any(thing.pair in HELD_OUT for scene in held for thing in scene)


def test_held_out_answers_are_even_where_those_of_training_are() -> None:
    answers: dict[str, Counter[str]] = {}
    for index in range(360):
        drawn, question = heldout_item(0, index)
        assert answer_of(drawn.scene, question.text) == question.answer
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    assert set(answers["colour"].values()) == {10}
    assert set(answers["shape"].values()) == {20}
    assert answers["existence"] == answers["comparison"] == {"yes": 30, "no": 30}
    assert sum(answers["count"].values()) == sum(answers["relation"].values()) == 60


def test_files_hold_what_they_promise(written: Path) -> None:
    summary = json.loads((written / "scenes.json").read_text())
    assert summary["settings"] == {**SMALL, "heldout": 24, "unseen": 18, "questions_per_scene": 6}
    counts = {"train": 61, "heldout": 24, "unseen": 18, "lessons": 30}
    for split, count in counts.items():
        names = sorted(path.name for path in (written / "images" / split).iterdir())
        assert names == [f"{index:06d}.png" for index in range(count)]
    captioned, described_rows = lines(written / "captions.jsonl"), lines(written / "captions_chat.jsonl")
    chats = lines(written / "chat.jsonl")
    assert len(captioned) == len(described_rows) == len(chats) == 61
    for index, (row, description, chat) in enumerate(zip(captioned, described_rows, chats, strict=True)):
        image = f"train/{index:06d}.png"
        assert row["image"] == image
        assert len(row["captions"]) == 2
        scene = tuple(parse(row["captions"][0]))
        assert all(parse(caption) == Counter(scene) for caption in row["captions"])
        asked, told = description["messages"]
        picture = {"type": "image", "image": image}
        wanted = {"type": "text", "text": "describe the picture."}
        assert asked == {"role": "user", "content": [picture, wanted]}
        assert told["role"] == "assistant"
        assert parse(told["content"]) == Counter(scene)
        turns = chat["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 6
        assert turns[0]["content"][0] == picture
        turns[0]["content"] = turns[0]["content"][1]["text"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert answer_of(scene, question["content"]) == answer["content"]
        pixels = np.asarray(Image.open(written / "images" / image))
        assert pixels.shape == (64, 64, 3)
    for split in ("heldout", "unseen"):
        rows = lines(written / f"{split}.jsonl")
        assert [set(row) for row in rows] == [{"id", "image", "question", "answer", "kind"}] * counts[split]
        assert set(Counter(row["kind"] for row in rows).values()) == {counts[split] // 6}
        assert all((written / "images" / row["image"]).is_file() for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)


def test_files_do_not_depend_on_processes_and_scenes_not_on_how_many(written: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    many = {**SMALL, "train": 1100, "text_rows": 0, "lessons": 600}
    write_scenes(tmp_path / "two", **many, processes=2, progress=lambda *call: calls.append(call))
    write_scenes(tmp_path / "one", **many, processes=1)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert calls[-1] == (1742, 1742)
    assert calls == sorted(calls)
    first, second = files(written), files(tmp_path / "one")
    for name in first:
        if name.startswith("images/") and "/lessons/" not in name:  # their order is a share of the whole
            assert first[name] == second[name]
    assert second["chat.jsonl"].startswith(first["chat.jsonl"])


def test_lessons_ask_in_one_way_after_the_other() -> None:
    colours, shapes = "|".join(COLOURS), "|".join(SHAPES)
    colour_at = r"what color is the object in the \w+[?]"
    where = rf"where is the ((small|large) )?({colours}) ({shapes})[?]"
    shape_at = r"what shape is the object in the \w+[?]"
    ways = (
        (23, colour_at),
        (32, rf"{where}|{colour_at}"),
        (27, rf"how many ({colours}) objects are there[?]"),
        (18, rf"{colour_at}|{shape_at}|{where}"),
    )
    lessons = [(number, way) for number, (pictures, way) in enumerate(ways) for _ in range(pictures)]
    last: list[str] = []
    for index, (lesson, way) in enumerate(lessons):
        drawn, rows = lesson_rows(0, index, 100, 4, "picture.png")
        asked = []
        for user, assistant in (row["messages"] for row in rows):
            picture, question = user["content"]
            assert picture == {"type": "image", "image": "picture.png"}
            assert answer_of(drawn.scene, question["text"]) == assistant["content"]
            assert re.fullmatch(way, question["text"]), (index, question["text"])
            asked.append(question["text"])
        assert len(set(asked)) == 4
        if lesson != 2:
            assert len({thing.colour for thing in drawn.scene}) >= 3
        if lesson == 1:
            assert sum(text.startswith("where") for text in asked) == 3
        last = last + asked if lesson == 3 else []
    starts = Counter(text.split()[1] for text in last)
    assert set(starts) == {"color", "shape", "is"}
    assert min(starts.values()) > 20
    with pytest.raises(ValueError, match="allows 1 questions, 4 were asked for"):
        ask_many(np.random.default_rng(0), (Thing("small", "red", "circle", PLACES[0]),), 4, ("colour",), names_a_place)


def test_another_seed_draws_other_scenes(written: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "out", **{**SMALL, "seed": 4}, processes=1)
    one, two = files(written), files(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(one[name] != two[name] for name in one)


def test_writing_again_changes_nothing(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert write_scenes(written, **SMALL) == json.loads((written / "scenes.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_other_settings_and_foreign_folders_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed 3 where 5 is asked for"):
        write_scenes(written, **{**SMALL, "seed": 5})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no scenes"):
        write_scenes(tmp_path, **SMALL)
    with pytest.raises(UserError, match="is a file"):
        write_scenes(tmp_path / "notes.txt", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", **SMALL, processes=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("train", -1), ("seed", -1), ("questions_per_scene", 0), ("questions_per_scene", 13), ("processes", 0)],
)
def test_numbers_out_of_range_are_named(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} must be .*, not {value}"):
        write_scenes(tmp_path / "out", **{name: value})


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=0, heldout=0, unseen=0, text_rows=0)
    assert (tmp_path / "chat.jsonl").read_text() == ""
