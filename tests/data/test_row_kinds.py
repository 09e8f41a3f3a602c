"""Rows in the spellings that people have: each is read as it was meant, or refused with the key that isn't read."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.benchmarks.choice import Problem, ScienceQA, make_item
from data.formats import CAPTION_PROMPT, read_row
from tests.data.row_kinds import chat, qa, said, talk
from vlm.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "3.jpg", "sub/4.jpg"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


PLAIN = ["user: [0]q", "assistant: a"]
TWO = ["user: [0][1]q", "assistant: a"]
GOOD: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    **{
        f"the key {key}": (qa(**{key: "1.jpg"}), PLAIN, ["1.jpg"])
        for key in (
            "image",
            "images",
            "img",
            "picture",
            "photo",
            "image_path",
            "imagePath",
            "Image",
            "image_file",
            "img_path",
            "file_name",
            "filename",
            "image_name",
            "image_url",
            "front_file_name",
        )
    },
    "a list of one key": (qa(image=["1.jpg", "2.jpg"]), TWO, ["1.jpg", "2.jpg"]),
    "file_names": (qa(file_names=["2.jpg", "1.jpg"]), TWO, ["2.jpg", "1.jpg"]),
    "two columns of an image folder": (qa(left_file_name="2.jpg", right_file_name="1.jpg"), TWO, ["2.jpg", "1.jpg"]),
    "numbered keys in order of numbers": (
        qa(image_10="3.jpg", image_1="2.jpg", image_0="1.jpg"),
        ["user: [0][1][2]q", PLAIN[1]],
        ["1.jpg", "2.jpg", "3.jpg"],
    ),
    "numbered keys of which some are null": (qa(image_0="1.jpg", image_1=None, video=None), PLAIN, ["1.jpg"]),
    "a name beside the same image": (
        qa(image="sub/4.jpg", file_name="4.jpg", coco_url="http://x/4.jpg"),
        PLAIN,
        ["4.jpg"],
    ),
    "one of the images beside all": (qa(image="1.jpg", images=["1.jpg", "2.jpg"]), TWO, ["1.jpg", "2.jpg"]),
    "an image struct": (qa(image={"path": "1.jpg", "bytes": None}), PLAIN, ["1.jpg"]),
    "a mark of the question": (qa(question="<image>\nq", image="1.jpg"), PLAIN, ["1.jpg"]),
    "a mark inside of the question": (
        qa(question="is <image> q", image="1.jpg"),
        ["user: is [0] q", PLAIN[1]],
        ["1.jpg"],
    ),
    "numbered marks": (
        qa(question="<image 2> or <image 1>?", image_1="1.jpg", image_2="2.jpg"),
        ["user: [0] or [1]?", PLAIN[1]],
        ["2.jpg", "1.jpg"],
    ),
    "Phi's marks": (chat("<|image_1|>\nq", images=["1.jpg"]), PLAIN, ["1.jpg"]),
    "Qwen2-VL's marks": (
        chat("<|vision_start|><|image_pad|><|vision_end|>q", images=["1.jpg"]),
        PLAIN,
        ["1.jpg"],
    ),
    **{
        f"the mark {mark}": (chat(f"{mark}\nq", images=["1.jpg"]), PLAIN, ["1.jpg"])
        for mark in (
            *("<Image>", "<IMAGE>", "<image/>", "<image />", "<image:1>", "<Image_1>", "[IMG]"),
            *("<start_of_image>", "<IMG_CONTEXT>", "<image_soft_token>"),
        )
    },
    "DeepSeek-VL's marks": (chat("<image_placeholder>q", images=["1.jpg"]), PLAIN, ["1.jpg"]),
    "a mark that is a word": (qa(question="is <image> a tag?"), ["user: is <image> a tag?", PLAIN[1]], []),
    "query and response": ({"query": "<image>q", "response": "a", "images": ["1.jpg"]}, PLAIN, ["1.jpg"]),
    "query, response and history": (
        {"query": "q", "response": "a", "history": [["h", "g"]], "system": "s", "images": ["1.jpg"]},
        ["system: s", "user: [0]h", "assistant: g", "user: q", "assistant: a"],
        ["1.jpg"],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a", "image": "1.jpg"}, PLAIN, ["1.jpg"]),
    "prompt and completion of messages": (
        {
            **chat("", ""),
            "messages": None,
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
            "images": ["1.jpg"],
        },
        PLAIN,
        ["1.jpg"],
    ),
    "alpaca": (
        {"instruction": "i", "input": "q", "output": "a", "system": "s", "history": [], "images": ["1.jpg"]},
        ["system: s", "user: [0]i\nq", "assistant: a"],
        ["1.jpg"],
    ),
    "alpaca without an input": ({"instruction": "q", "input": "", "output": "a", "image": "1.jpg"}, PLAIN, ["1.jpg"]),
    "input and output": ({"input": "q", "output": "a", "image": "1.jpg"}, PLAIN, ["1.jpg"]),
    "POPE": (
        {"question_id": 1, "image": "1.jpg", "text": "q", "label": "yes"},
        ["user: [0]q", "assistant: yes"],
        ["1.jpg"],
    ),
    "a question and its label": ({"question": "q", "label": "a", "image": "1.jpg"}, PLAIN, ["1.jpg"]),
    "text with an answer": ({"text": "q", "answer": "a", "image": "1.jpg"}, PLAIN, ["1.jpg"]),
    "a question with a caption": (qa(image="1.jpg", caption="c"), PLAIN, ["1.jpg"]),
    "a number": (qa(answer=3), ["user: q", "assistant: 3"], []),
    "a fraction": (qa(answer=2.5), ["user: q", "assistant: 2.5"], []),
    "a boolean": (qa(answer=False), ["user: q", "assistant: false"], []),
    "answers of numbers": ({"question": "q", "answers": [2, 3, 3]}, ["user: q", "assistant: 3"], []),
    "answers as SQuAD has them": (
        {"question": "q", "context": "c", "answers": {"text": ["a", "b", "a"], "answer_start": [1, 2, 3]}},
        ["user: Context: c\nq", "assistant: a"],
        [],
    ),
    "answers as datasets have them": (
        {"question": "q", "answers": {"answer": ["b", "a", "a"], "answer_confidence": ["yes"] * 3}},
        ["user: q", PLAIN[1]],
        [],
    ),
    "ChartQA": ({"image": "1.jpg", "query": "q", "label": ["a"], "human_or_machine": 0}, PLAIN, ["1.jpg"]),
    "MMMU": (
        {
            "question": "which? <image 1>",
            "options": "['<image 2>', 'b']",
            "answer": "B",
            "image_1": "1.jpg",
            "image_2": "2.jpg",
            "image_3": None,
            "explanation": "?",
        },
        [
            "user: which? [0]\nA. [1]\nB. b\nAnswer with the option's letter from the given choices directly.",
            "assistant: B",
        ],
        ["1.jpg", "2.jpg"],
    ),
    "the answer that VQAv2 chose": (
        {"question": "q", "answers": [{"answer": "b"}] * 3, "multiple_choice_answer": "a"},
        ["user: q", PLAIN[1]],
        [],
    ),
    "a caption with a system text": (
        {"image": "1.jpg", "caption": "a", "system": "s"},
        ["system: s", f"user: [0]{CAPTION_PROMPT}", PLAIN[1]],
        ["1.jpg"],
    ),
    "LLaMA-Factory and ms-swift": (chat("<image>q", images=["1.jpg"]), PLAIN, ["1.jpg"]),
    "messages with an image beside": (chat("q", image="1.jpg"), PLAIN, ["1.jpg"]),
    "messages with images beside": (chat("q", images=["1.jpg", "2.jpg"]), TWO, ["1.jpg", "2.jpg"]),
    "messages with a system text": (
        {"messages": [{"role": "system", "content": "s"}, *chat("q")["messages"]], "image": "1.jpg"},
        ["system: s", *PLAIN],
        ["1.jpg"],
    ),
    "a system text beside messages": (chat("q", system="s"), ["system: s", "user: q", PLAIN[1]], []),
    "marks of a later turn": (
        {"messages": [*chat("q")["messages"], *chat("<image>r")["messages"]], "images": ["2.jpg"]},
        ["user: q", PLAIN[1], "user: [0]r", PLAIN[1]],
        ["2.jpg"],
    ),
    "marks in a text part": (chat([{"type": "text", "text": "<image>q"}], images=["1.jpg"]), PLAIN, ["1.jpg"]),
    "indices out of order": (
        chat(
            [
                {"type": "image", "index": 1, "text": None},
                {"type": "text", "text": "q", "index": None},
                {"type": "image", "index": 0},
            ],
            images=["1.jpg", "2.jpg"],
        ),
        ["user: [0]q[1]", PLAIN[1]],
        ["2.jpg", "1.jpg"],
    ),
    "an index twice": (
        chat(
            [{"type": "image", "index": 0}, {"type": "text", "text": "q"}, {"type": "image", "index": 0}],
            images=["1.jpg"],
        ),
        ["user: [0]q[1]", PLAIN[1]],
        ["1.jpg", "1.jpg"],
    ),
    "parts by name and the same images beside": (
        chat([{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "q"}], images=["1.jpg"]),
        PLAIN,
        ["1.jpg"],
    ),
    "parts by name and an address beside": (
        chat([{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "q"}], image_url="http://a/b.jpg"),
        PLAIN,
        ["1.jpg"],
    ),
    "parts by name and the name in another folder beside": (
        chat([{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "q"}], file_name="train/1.jpg"),
        PLAIN,
        ["1.jpg"],
    ),
    "OpenAI's image_url": (
        chat([{"type": "image_url", "image_url": {"url": "1.jpg", "detail": "low"}}, {"type": "text", "text": "q"}]),
        PLAIN,
        ["1.jpg"],
    ),
    "OpenAI's input_image": (
        chat([{"type": "input_image", "image_url": "1.jpg"}, {"type": "input_text", "text": "q"}]),
        PLAIN,
        ["1.jpg"],
    ),
    "transformers' path": (chat([{"type": "image", "path": "1.jpg"}, {"type": "text", "text": "q"}]), PLAIN, ["1.jpg"]),
    "OpenAI's developer": (
        {"messages": [{"role": "developer", "content": "s"}, *chat("q")["messages"]]},
        ["system: s", "user: q", PLAIN[1]],
        [],
    ),
    "images of a turn": (
        {"messages": [{"role": "user", "content": "q", "images": ["1.jpg"]}, {"role": "assistant", "content": "a"}]},
        PLAIN,
        ["1.jpg"],
    ),
    "Qwen-VL": (chat("Picture 1: <img>1.jpg</img>\nq"), ["user: Picture 1: [0]\nq", PLAIN[1]], ["1.jpg"]),
    "pictures in parts with their id beside": (
        chat([{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "q"}], image_id=7, original="x/1.jpg"),
        PLAIN,
        ["1.jpg"],
    ),
    "Qwen-VL in LLaVA's rows": (talk("<img>1.jpg</img>q"), PLAIN, ["1.jpg"]),
    "ShareGPT with images and a system text": (
        talk("<image>q", images=["1.jpg"], system="s", tools="[]"),
        ["system: s", *PLAIN],
        ["1.jpg"],
    ),
    "conversations with roles": ({"conversations": chat("<image>q")["messages"], "image": "1.jpg"}, PLAIN, ["1.jpg"]),
    "the_cauldron": (
        {
            "images": ["1.jpg"],
            "texts": [{"user": "q", "assistant": "a", "source": "s"}, {"user": "r", "assistant": "b"}],
        },
        [*PLAIN, "user: r", "assistant: b"],
        ["1.jpg"],
    ),
    "FineVision": (
        {
            "images": ["1.jpg", "2.jpg"],
            "texts": [{"user": "<image>q<image>", "assistant": "a"}],
            "relevance_ratings": [5],
            "relevance_min": 5,
            "source": "s",
        },
        ["user: [0]q[1]", PLAIN[1]],
        ["1.jpg", "2.jpg"],
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_row_is_read_as_it_was_meant(root: Path, kind: str) -> None:
    row, messages, images = GOOD[kind]
    assert said(row, root) == (messages, images)


def test_what_weighs_nothing_is_marked(root: Path) -> None:
    row = chat("q")
    row["messages"] += chat("r", "b")["messages"]
    for key in ("weight", "train", "loss", "loss_weight", "loss_scale", "trainable", "train_on_turn"):
        row["messages"][1] = {"role": "assistant", "content": "a", key: 0}
        row["messages"][3] = {"role": "assistant", "content": "b", key: True}
        weights = [message.get("weight") for message in read_row(row, "rows:3", root).messages]
        assert weights == [None, 0, None, None]


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["x", "y", "z"], "answer": 1},
        {"choices": ["x", "y", "z"], "answer": "B"},
        {"choices": ["x", "y", "z"], "answer": "(b)"},
        {"choices": ["x", "y", "z"], "answer": "y"},
        {"choices": ["x", "y", "z"], "answer": "Y"},
        {"options": "['x', 'y', 'z']", "answer": "1"},
        {"options": ["A. x", "B. y", "C. z"], "answer": "B"},
        {"options": ["(A) x", "(B) y", "(C) z"], "answer": 1},
        {"options": ["A. x", "B. y", "C. z"], "answer": "B. y"},
        {"options": ["A. x", "B. y", "C. z"], "answer": "(B) Y"},
        {"options": {"A": "x", "B": "y", "C": "z"}, "answer": "B"},
        {"choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answer": "B"},
        {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": "2"},
        {"choices": {"text": ["x", "y", "z"], "label": ["B", "A", "C"]}, "answer": "A"},
        {"A": "x", "B": "y", "C": "z", "D": None, "answer": "B"},
    ],
)
def test_a_question_of_multiple_choice_is_asked_and_answered_as_science_qa_is(root: Path, row: dict[str, Any]) -> None:
    item = make_item("1", Problem("q", ["x", "y", "z"], 1, "h"), None)
    asked = ScienceQA.prompt.format(question=item.question)
    assert said({"question": "q", "hint": "h", "image": "1.jpg", **row}, root)[0] == [
        f"user: [0]{asked}",
        "assistant: B",
    ]


def test_rows_are_what_they_were_after_a_trip_through_json(root: Path) -> None:
    for row, messages, images in GOOD.values():
        assert said(json.loads(json.dumps(row)), root) == (messages, images)


TALK, OTHER = (talk("q", answer)["conversations"] for answer in ("a", "b"))


@pytest.mark.parametrize(
    ("row", "listed"),
    [
        ({"image": "1.jpg", "caption": "a", "captions": ["b", "c"]}, {"caption"}),
        ({"image": "1.jpg", "text": "a", "description": "b"}, {"description"}),
        ({"image": "1.jpg", "description": "a", "alt_text": "b"}, {"alt_text"}),
        (qa(context="x", hint="y", passage="z"), {"hint", "passage"}),
        (qa(context="x", hint="x"), set()),
        (qa(system="x", system_prompt="y"), {"system_prompt"}),
        (chat("q", system="x", system_prompt="y"), {"system_prompt"}),
        ({"question": "q", "answer": "A", "choices": ["u", "v"], "options": ["u", "w"]}, {"options"}),
        ({"question": "q", "answer": "B", "choices": ["u", "v"], "A": "u", "B": "w"}, {"B"}),
        ({"conversations": TALK, "conversation": OTHER}, {"conversation"}),
    ],
)
def test_a_second_key_of_one_meaning_is_noted_where_it_says_something_else(
    root: Path, row: dict[str, Any], listed: set[str]
) -> None:
    assert set(read_row(row, "rows:3", root).ignored) == listed


def test_a_masked_turn_is_not_learned(root: Path) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    turns[1]["mask"], turns[3]["mask"] = True, False  # type: ignore[assignment]
    weights = [message.get("weight") for message in read_row({"messages": turns}, "rows:3", root).messages]
    assert weights == [None, 0, None, None]
    turns[1]["mask"] = "a.png"
    with pytest.raises(UserError, match=r"message 2: mask must be true \(not learned\) or false"):
        read_row({"messages": turns}, "rows:3", root)


@pytest.mark.parametrize(
    "mark", ["<Image>", "[IMG]", "<|image_1|>", "<image_1>", "<|vision_start|><|image_pad|><|vision_end|>"]
)
def test_a_mark_on_a_line_of_its_own_without_a_picture_is_an_error(root: Path, mark: str) -> None:
    with pytest.raises(UserError, match="but no picture is named in the row"):
        read_row(chat(f"{mark}\nq"), "rows:3", root)
    assert read_row(chat(f"what does {mark} mean?"), "rows:3", root).images == ()


@pytest.mark.parametrize("asked", ["which?\nA. x\nB. y", "which? (A) x (B) y", "which?\nA: x\nB: y\n"])
def test_options_that_a_question_lists_itself_are_not_listed_again(root: Path, asked: str) -> None:
    row = {"question": asked, "choices": ["x", "y"], "answer": "y"}
    record = read_row(row, "rows:1", root)
    assert record.messages[0]["content"] == [
        {"type": "text", "text": f"{asked}\nAnswer with the option's letter from the given choices directly."}
    ]
    assert record.messages[1]["content"] == [{"type": "text", "text": "B"}]
    whole = record.messages[0]["content"][0]["text"]
    assert read_row(row | {"question": whole}, "rows:1", root).messages[0] == record.messages[0]
    other = read_row(row | {"question": "is x or y A. x?"}, "rows:2", root)
    assert other.messages[0]["content"][0]["text"].startswith("is x or y A. x?\nA. x\nB. y\n")


def test_passages_of_a_context_stand_below_each_other(root: Path) -> None:
    row = {"question": "q", "context": ["one", "two"], "answer": "a"}
    assert read_row(row, "rows:1", root).messages[0]["content"] == [{"type": "text", "text": "Context: one\ntwo\nq"}]
