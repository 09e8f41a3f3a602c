"""What a model is asked: demonstrations, controls, and choices ranked by their likelihood."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.benchmarks import Item, find_benchmark
from data.pictures import ImageRef, MissingImage
from tests.conftest import TinyModels
from train.evaluation.local import LocalModel
from train.evaluation.prompts import Prompt, Shots, Turn, controlled_images, make_prompts
from vlm.checkpoint import load
from vlm.errors import UserError

EXACT = find_benchmark("exact")


def items(count: int, folder: Path = Path("pictures")) -> list[Item]:
    return [Item(str(n), f"what is {n}?", ("red", "red", "blue"), folder / f"{n % 5}.png") for n in range(count)]


def test_demonstrations_are_drawn_by_the_seed_and_never_show_the_answer_image() -> None:
    asked, pool = items(6), items(20)
    prompts = make_prompts(EXACT, asked, "{question} Briefly.", shots=Shots(4, pool, seed=3))
    for item, prompt in zip(asked, prompts, strict=True):
        *shown, question = prompt.turns
        assert (question.text, question.answer, question.image) == (f"{item.question} Briefly.", "", item.image)
        assert len(shown) == 4
        assert item.image not in {turn.image for turn in shown}
        assert {turn.answer for turn in shown} == {"red"}  # what most people said
        assert len(prompt.images) == 5
    again = make_prompts(EXACT, asked, "{question} Briefly.", shots=Shots(4, pool, seed=3))
    assert again == prompts
    assert make_prompts(EXACT, asked, "{question} Briefly.", shots=Shots(4, pool, seed=4)) != prompts
    roles = [message["role"] for message in prompts[0].messages()]
    assert roles == ["user", "assistant"] * 4 + ["user"]
    assert prompts[0].messages()[0]["content"][0] == {"type": "image"}
    with pytest.raises(UserError, match="--shots 4: question 0 has only 2 demonstrations with another image, among 3"):
        make_prompts(EXACT, asked, "{question}", shots=Shots(4, pool[:3], seed=0))


def test_a_question_is_never_its_own_demonstration() -> None:
    asked = [Item(str(n), f"what is {n}?", ("red",)) for n in range(4)]
    for item, prompt in zip(asked, make_prompts(EXACT, asked, "{question}", shots=Shots(3, asked, 0)), strict=True):
        assert sorted(turn.text for turn in prompt.turns[:-1]) == [one.question for one in asked if one is not item]


def test_blind_prompts_show_no_image_at_all() -> None:
    prompts = make_prompts(EXACT, items(3), "{question}", "blind", shots=Shots(2, items(20), seed=0))
    assert all(prompt.images == [] for prompt in prompts)
    assert all(part["type"] == "text" for message in prompts[0].messages() for part in message["content"])


def test_shuffled_prompts_show_another_questions_image() -> None:
    asked = items(40)
    images = controlled_images(asked, "shuffled", 1)
    assert all(image != item.image for image, item in zip(images, asked, strict=True))
    assert sorted(map(str, images)) == sorted(str(item.image) for item in asked)
    mostly = [Item(str(n), "", (), Path("a.png" if n < 7 else "b.png")) for n in range(10)]
    with pytest.raises(UserError, match="one image belongs to more than half of the items"):
        controlled_images(mostly, "shuffled", 0)


def check_shuffled(images: list[ImageRef | None], seed: int) -> None:
    """A permutation of the pictures that are there, nobody's own; the others stay."""
    shown = controlled_images([Item(str(n), "", (), image) for n, image in enumerate(images)], "shuffled", seed)
    assert Counter(shown) == Counter(images)
    for image, other in zip(images, shown, strict=True):
        assert (image == other) is isinstance(image, MissingImage)


def test_shuffling_succeeds_wherever_it_can() -> None:
    draw = random.Random(0)
    possible = 0
    for seed in range(3000):
        images: list[ImageRef | None] = [
            Path(str(draw.randrange(draw.randint(1, 4)))) for _ in range(draw.randint(1, 9))
        ]
        half = Counter(images).most_common(1)[0][1] * 2 <= len(images)
        possible += half
        for n in range(draw.randint(0, 3)):
            images.insert(draw.randint(0, len(images)), MissingImage(str(n), "gone"))
        if half:
            check_shuffled(images, seed)
        else:
            with pytest.raises(UserError, match="--control shuffled"):
                check_shuffled(images, seed)
    assert 500 < possible < 2500


def test_few_pictures_with_many_questions_are_shuffled_at_once() -> None:
    check_shuffled([Path(str(n % 20)) for n in range(50_000)], 0)
    check_shuffled([Path(str(n if n % 2 else 0)) for n in range(50_000)], 0)  # one of them half of the time


@pytest.mark.parametrize("control", ["none", "blind", "shuffled"])
def test_a_question_whose_picture_is_missing_fails_under_every_control(control: str) -> None:
    asked = items(10)
    gone = [Item(f"gone{n}", "?", ("red",), MissingImage(f"{n}.png", "not there")) for n in range(2)]
    mixed = [gone[0], *asked[:5], gone[1], *asked[5:]]
    prompts = make_prompts(EXACT, mixed, "{question}", control, shots=Shots(2, items(20), seed=0))
    for item, prompt in zip(mixed, prompts, strict=True):
        missing = [image for image in prompt.images if isinstance(image, MissingImage)]
        assert missing == ([item.image] if item in gone else [])
        if control == "blind":
            assert prompt.images == missing


def test_braces_in_questions_and_prompts_are_text() -> None:
    asked = [Item("a", "what is {0} or {question}?", ("x",))]
    assert make_prompts(EXACT, asked, '{"q": "{question}"}')[0].turns[0].text == '{"q": "what is {0} or {question}?"}'


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_ranking_takes_the_likeliest_choice(fusion: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    model, processor = load(tiny_models(fusion, "mlp"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    choices = ("A", "B", "no idea", "a red one")
    prompts = []
    for n in range(6):
        Image.new("RGB", (20 + n, 30), (40 * n, 90, 200 - 30 * n)).save(tmp_path / f"{n}.png")
        prompts.append(Prompt(str(n), (Turn(f"which {n}?", tmp_path / f"{n}.png" if n % 3 else None),), choices))
    asker = LocalModel(model, processor, 8, rank=True)
    told = {reply.id: reply.answer for replies in asker.replies([prompts]) for reply in replies}
    likely = asker.likelihoods(asker.prepare(prompts))
    for prompt, found in zip(prompts, likely, strict=True):  # one sequence after the other, token by token
        batch = LocalModel(model, processor, 8).prepare([prompt])
        totals = []
        for choice in choices:
            ending = processor.chat.encode_text(choice, inner=True)
            with torch.no_grad():
                logits = model(torch.tensor([batch.ids[0] + ending]), **batch.pixels).logits[0]
            start = len(batch.ids[0]) - 1
            scored = [logits[start + k].float().log_softmax(-1)[token].item() for k, token in enumerate(ending)]
            totals.append(sum(scored))
        assert found == pytest.approx(totals, abs=1e-3)
        assert told[prompt.id] == choices[max(range(len(choices)), key=totals.__getitem__)]


def test_tasks_with_choices_can_be_ranked(tmp_path: Path) -> None:
    problem = {"question": "which?", "choices": ["x", "y", "z"], "answer": 1, "hint": "", "image": None}
    (tmp_path / "problems.json").write_text(json.dumps({"7": {**problem, "split": "test"}}))
    sqa = find_benchmark("scienceqa")
    prompts = make_prompts(sqa, sqa.items(tmp_path, None), sqa.prompt)
    assert prompts[0].choices == ("A", "B", "C")
    assert prompts[0].turns[0].text == (
        "which?\nA. x\nB. y\nC. z\nAnswer with the option's letter from the given choices directly."
    )
