"""Questions of one's own are asked as training reads their rows: all pictures in their places, turns before."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.benchmarks import Item, find_benchmark
from data.benchmarks.columns import load_items
from data.pictures import MissingImage, read_bytes
from data.sources import open_source
from tests.data.row_kinds import chat, qa, talk
from train.evaluation.journal import digest
from train.evaluation.outputs import Evaluation, pictures_told
from train.evaluation.prompts import Prompt, Reply, Shots, make_prompts
from train.evaluation.tasks import Question, make_tasks
from vlm import UserError
from vlm.settings import parse

EXACT = find_benchmark("exact")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(1, 6):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / "images" / f"{number}.jpg")
    return tmp_path


def items(folder: Path, *rows: dict[str, Any]) -> list[Item]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_items(EXACT, path, None, None)


def asked(prompt: Prompt) -> list[str]:
    """Messages as `role: text`, an image as its name in brackets."""
    names = iter(Path(str(image)).stem for image in prompt.images)
    said = [
        f"{message['role']}: "
        + "".join(f"[{next(names)}]" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in prompt.messages()
    ]
    assert next(names, None) is None
    return said


KINDS: dict[str, tuple[dict[str, Any], list[str], tuple[str, ...]]] = {
    "one image": (qa(image_path="1.jpg"), ["user: [1]q?"], ("a",)),
    "no image": (qa(), ["user: q?"], ("a",)),
    "several images": (qa(image_0="1.jpg", image_1="2.jpg"), ["user: [1][2]q?"], ("a",)),
    "a mark in the question": (qa(question="is <image> q", image="1.jpg"), ["user: is [1] q?"], ("a",)),
    "LLaVA": (talk("<image>\nq", image="1.jpg"), ["user: [1]q?"], ("a",)),
    "messages": (chat("q<image>", images=["3.jpg"]), ["user: q[3]?"], ("a",)),
    "turns before": (
        {"messages": [*chat("<image>h", "g")["messages"], *chat("q")["messages"]], "images": ["2.jpg"], "system": "s"},
        ["system: s", "user: [2]h", "assistant: g", "user: q?"],
        ("a",),
    ),
    "several answers": ({"question": "q", "answers": ["b", "a", "a", "c"]}, ["user: q?"], ("a", "b", "c")),
    "a number": (qa(answer=3, image="1.jpg"), ["user: [1]q?"], ("3",)),
    "captions": ({"image": "1.jpg", "captions": ["c", "d"], "prompt": "say"}, ["user: [1]say?"], ("c", "d")),
    "POPE": ({"image": "1.jpg", "text": "q", "label": "yes"}, ["user: [1]q?"], ("yes",)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_asked_as_it_is_learned(folder: Path, kind: str) -> None:
    row, messages, references = KINDS[kind]
    (item,) = items(folder, row)
    (prompt,) = make_prompts(EXACT, [item], "{question}?")
    assert asked(prompt) == messages
    assert item.references == references
    for said in references:
        assert EXACT.score([item], {item.id: f" {said}\n"}).metrics["accuracy"] == 1
    assert EXACT.score([item], {item.id: "z"}).metrics["accuracy"] == 0
    learned = open_source(folder / "rows.jsonl")[0]
    assert [*learned.images] == prompt.images
    (plain,) = make_prompts(EXACT, [item], "{question}")
    assert plain.messages() == [{"role": m["role"], "content": m["content"]} for m in learned.messages[:-1]]


def test_pictures_in_columns_are_asked_about_and_read_late(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = [{"bytes": (folder / "images" / f"{number}.jpg").read_bytes(), "path": None} for number in (1, 2)]
    rows = [{"images": held, **chat("<image>q<image>")}, {"images": held[:1], **chat("<image>r")}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    found = load_items(EXACT, folder / "rows.parquet", None, None)
    assert [[read_bytes(image) for image in item.images] for item in found] == [
        [one["bytes"] for one in held],
        [held[0]["bytes"]],
    ]
    assert found[0].images[0] == found[1].images[0]  # the same picture, which is no demonstration for itself
    assert not any(hasattr(image, "data") for item in found for image in item.images)


def test_controls_withhold_and_exchange_every_picture(folder: Path) -> None:
    found = items(folder, qa(image_0="1.jpg", image_1="2.jpg"), qa(image="3.jpg"), qa(images=["4.jpg", "5.jpg"]))
    blind = make_prompts(EXACT, found, "{question}", "blind")
    assert [asked(prompt) for prompt in blind] == [["user: q"]] * 3
    for seed in range(20):
        shuffled = make_prompts(EXACT, found, "{question}", "shuffled", seed)
        for item, prompt in zip(found, shuffled, strict=True):
            assert len(prompt.images) == len(item.images)
            assert not {*prompt.images} & {*item.images}
    # images that go together in one row are told apart in others
    found = items(
        folder, *(qa(images=[f"{n}.jpg", f"{n % 5 + 1}.jpg"]) for n in range(1, 6)), *(qa(image="1.jpg"), qa())
    )
    for item, prompt in zip(found, make_prompts(EXACT, found, "{question}", "shuffled", 3), strict=True):
        assert not {*prompt.images} & {*item.images}
    with pytest.raises(UserError, match="some images belong to too many of the items"):
        make_prompts(EXACT, items(folder, *[qa(images=["1.jpg", "2.jpg"])] * 3), "{question}", "shuffled")
    shown = make_prompts(EXACT, found, "{question}")
    blind = make_prompts(EXACT, found, "{question}", "blind")
    assert digest(shown) != digest(blind)


def test_pictures_that_are_missing_fail_their_question_alone(folder: Path) -> None:
    found = items(folder, qa(images=["1.jpg", "none.jpg"]), qa(image="2.jpg"))
    assert [type(image) for image in found[0].images] == [type(Path()), MissingImage]
    with pytest.raises(UserError, match=r"none\.jpg' is not in"):
        read_bytes(found[0].images[1])


def test_demonstrations_show_all_their_pictures(folder: Path) -> None:
    found = items(folder, qa(images=["1.jpg", "2.jpg"]), qa(image="3.jpg"), qa(image="2.jpg"))
    prompt = make_prompts(EXACT, found[1:2], "{question}", shots=Shots(1, found[:1], 0))[0]
    assert asked(prompt) == ["user: [1][2]q", "assistant: a", "user: [3]q"]
    with pytest.raises(UserError, match="only 0 demonstrations with another image"):
        make_prompts(EXACT, found[2:], "{question}", shots=Shots(1, found[:1], 0))


@pytest.mark.parametrize(
    ("rows", "control", "told"),
    [
        ([qa(image="1.jpg")], "none", "control: none, pictures shown with 1 of 1 questions"),
        ([qa(images=["1.jpg", "2.jpg"]), qa()], "none", "control: none, pictures shown with 1 of 2 questions"),
        ([qa(), qa()], "none", "control: none, no picture shown with 2 questions"),
        ([qa(image="1.jpg"), qa()], "blind", "control: blind, no picture shown with 2 questions"),
    ],
)
def test_the_report_says_how_many_questions_have_a_picture(
    folder: Path, rows: list[dict[str, Any]], control: str, told: str
) -> None:
    found = items(folder, *rows)
    prompts = make_prompts(EXACT, found, "{question}", control)
    replies = {prompt.id: Reply(prompt.id, "a", pictures="digest" * bool(prompt.images)) for prompt in prompts}
    images = {prompt.id: prompt.turns[-1].image for prompt in prompts}
    assert pictures_told(Evaluation(EXACT, found, replies, {"control": control}, images)) == told


def test_an_evaluation_reads_keys_of_other_names_and_keeps_them(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text('{"frage": "q", "gold": "a"}\n{"frage": "w", "gold": "b"}\n')
    columns = ("question=frage", "answer=gold")
    question = Question("m", "exact", rows, engine="http://127.0.0.1:9", columns=columns, shots=1, shots_data=rows)
    (task,) = make_tasks(question, folder / "out", controls=False)
    assert [(item.question, item.references) for item in task.items] == [("q", ("a",)), ("w", ("b",))]
    assert [turn["role"] for turn in task.prompts[0].messages()] == ["user", "assistant", "user"]
    held = json.loads(json.dumps(task.settings))
    assert parse(Question, {name: held[name] for name in ("model", "task", "data", "columns")}, "x").columns == columns
    with pytest.raises(UserError, match="--columns is for exact"):
        make_tasks(replace(question, task="pope"), folder / "out", controls=False)
