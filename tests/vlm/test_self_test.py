"""A model's test question: it comes with every whole model, its own answer passes, what differs doesn't."""

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.vlm.chats import PAIRS
from tests.vlm.conftest import LoadedModels
from vlm import UserError, load, save, self_test
from vlm.cli import main
from vlm.convert import imported
from vlm.self_test import QUANTISED, STEPS, Answer, SelfTest, check, distance

TinyModels = Callable[[str, str], Path]


def written(folder: Path) -> SelfTest:
    test = self_test.read(folder)
    assert test is not None
    return test


@torch.no_grad()
def said(model: Any, processor: Any, test: SelfTest, blind: bool = False, count: int = 20) -> Answer:
    """What the model says to the file's question, token by token and without a cache: an oracle of the file."""
    picture = Image.open(io.BytesIO(base64.b64decode(test.picture.removeprefix(self_test.URL))))
    content = [{"type": "image"}, {"type": "text", "text": test.text}]
    images = [Image.new("RGB", picture.size) if blind else picture.convert("RGB")]
    ids = processor.chat.encode(
        [{"role": "user", "content": content}], processor.placeholders(images), add_generation_prompt=True
    ).input_ids
    steps: list[tuple[int, dict[int, float]]] = []
    for _ in test.steps:
        now = torch.tensor([[*ids, *(token for token, _ in steps)]])
        best = model(input_ids=now, **processor.pixels(images)).logits[0, -1].float().log_softmax(-1).topk(count)
        steps.append((int(best.indices[0]), dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))))
    return Answer(len(ids), tuple(steps))


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_the_file_holds_what_the_model_says(
    tiny_models: TinyModels, loaded_models: LoadedModels, fusion: str, connector: str
) -> None:
    test, loaded = written(tiny_models(fusion, connector)), loaded_models(fusion, connector)
    answer = said(*loaded, test)
    assert 1 <= len(test.steps) <= STEPS
    assert [step[0][0] for step in test.steps] == [token for token, _ in answer.steps]
    assert distance(test.steps, answer.steps) < 1e-5
    assert test.dtype == "float32"
    assert "another picture makes" in check(test, answer, "float32", False)


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_what_answers_differently_is_refused(tiny_models: TinyModels, fusion: str) -> None:
    folder = tiny_models(fusion, "mlp")
    model, processor = load(folder)
    test = written(folder)
    with pytest.raises(UserError, match=r"differently .* apart, and rounding makes up to 0\.02"):
        check(test, said(model, processor, test, blind=True), "float32", False)
    half = load(folder, dtype=torch.bfloat16)[0]
    check(test, said(half, processor, test), "bfloat16", False)
    processor.image_processor.image_mean = [mean + 0.1 for mean in processor.image_processor.image_mean]
    with pytest.raises(UserError, match="differently"):
        check(test, said(model, processor, test), "float32", False)
    with pytest.raises(UserError, match="takes 7 tokens instead of"):
        check(test, Answer(7, said(model, processor, test).steps), "float32", False)


def test_bounds_follow_the_coarser_number_format(tiny_models: TinyModels) -> None:
    test = written(tiny_models("early", "mlp"))
    for dtype, saved, quantised, apart in (
        ("float32", "float32", False, 0.019),
        ("bfloat16", "float32", False, 0.29),
        ("float32", "bfloat16", False, 0.29),
        ("float16", "float32", False, 0.29),
        ("float32", "float32", True, 1.49),
    ):
        for excess, good in ((0.0, True), (0.02, False)):
            # every token that much likelier
            steps = tuple((s[0][0], {i: value + apart + excess for i, value in s}) for s in test.steps)
            answer, kind = Answer(test.prompt_tokens, steps), replace(test, dtype=saved, picture_matters=1.0)
            if good:
                told = check(kind, answer, dtype, quantised)
                assert ("can't be told" in told) == quantised  # another picture would make less than 4-bit weights do
            else:
                with pytest.raises(UserError, match="differently"):
                    check(kind, answer, dtype, quantised)
    nan = Answer(test.prompt_tokens, tuple((s[0][0], dict.fromkeys(dict(s), math.nan)) for s in test.steps))
    with pytest.raises(UserError, match="nan apart"):
        check(test, nan, "float32", True)
    with pytest.raises(UserError, match="inf apart"):
        check(test, Answer(test.prompt_tokens, ()), "float32", True)
    assert max(self_test.BOUNDS.values()) < QUANTISED


def test_answers_are_compared_up_to_where_they_part() -> None:
    expected = (((1, -0.5), (2, -0.5)), ((3, 0.0), (4, -9.0)))
    same = {1: -0.5, 2: -0.5}
    assert distance(expected, [(1, same), (3, {3: -1.0, 4: -9.0})]) == pytest.approx(0.5)
    assert distance(expected, [(2, same), (3, {3: -1.0, 4: -9.0})]) == 0.0  # a tie: what follows has another beginning
    assert distance(expected, [(1, same), (5, {5: 0.0, 4: -9.0})]) == pytest.approx(4.5)  # 3 is -9.0 at most
    assert distance(expected[:1], [(1, {1: -0.5, 6: -0.4})]) == 0.0  # 2 is -0.5 at most, which it may be


def test_a_model_that_cannot_be_asked_is_saved_all_the_same(
    loaded_models: LoadedModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = loaded_models("early", "mlp")
    text: Any = model.config.text_config
    known, text.max_position_embeddings = text.max_position_embeddings, 20
    try:
        save(model, processor, tmp_path / "small")
    finally:
        text.max_position_embeddings = known
    assert "tokens of a context of 20" in capsys.readouterr().err
    assert self_test.read(tmp_path / "small") is None
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_model_in_training_goes_on_as_it_was(loaded_models: LoadedModels, tmp_path: Path) -> None:
    model, processor = loaded_models("deep", "perceiver")
    before = torch.get_rng_state()
    model.train()
    try:
        save(model, processor, tmp_path / "model")
        assert model.training
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(lambda _: "{", "not valid JSON"), (lambda t: {**t, "version": 2}, "version 2"), (lambda _: [], "self_test.json")],
)
def test_a_broken_file_is_an_error(
    tiny_models: TinyModels, tmp_path: Path, change: Callable[[Any], Any], complaint: str
) -> None:
    found = change(json.loads((tiny_models("early", "mlp") / self_test.FILE).read_text()))
    (tmp_path / self_test.FILE).write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(UserError, match=complaint):
        self_test.read(tmp_path)


def test_imports_and_exports_bring_it(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(llava), "--out", str(tmp_path / "ours")]) == 0
    test = written(tmp_path / "ours")
    for layout in ("vlm", "llava-hf"):
        assert main(["export", str(tmp_path / "ours"), "--to", layout, "--out", str(tmp_path / layout)]) == 0
        copy = written(tmp_path / layout)
        assert copy.prompt_tokens == test.prompt_tokens
        assert distance(test.steps, [(step[0][0], dict(step)) for step in copy.steps]) < 1e-4
        assert copy.picture_matters == pytest.approx(test.picture_matters, abs=1e-3)
    capsys.readouterr()
    monkeypatch.setattr(imported.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert main(["import", str(llava), "--out", str(tmp_path / "large")]) == 0
    assert "no self_test.json" in capsys.readouterr().out
    assert self_test.read(tmp_path / "large") is None
