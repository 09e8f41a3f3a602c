"""One recipe from end to end: somebody's LLaVA comes in, learns from its owner's rows, leaves, and says the same
behind every engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from serve.torch_engine import TorchEngine
from tests.serve.helpers import picture
from tests.serve.vllm_models import Oracle, ask_engine, assert_same_tokens, cases
from tests.serve.vllm_server import serving
from tests.vlm.llavas import make_llava
from vlm import load
from vlm.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with the LLaVA, what was imported, the run and what was exported."""
    here = tmp_path_factory.mktemp("journey")
    make_llava(here / "llava", tiny_tokenizer, text={"head_dim": 32, "vocab_size": len(tiny_tokenizer)})
    rows = here / "mine"
    (rows / "images").mkdir(parents=True)
    with (rows / "rows.jsonl").open("w") as file:
        for number in range(24):
            picture(number).save(rows / "images" / f"{number}.png")
            said = [("human", f"<image>\nwhat is number {number}?"), ("gpt", f"number {number % 5}")]
            turns = [{"from": who, "value": text} for who, text in said]
            file.write(json.dumps({"image": f"{number}.png", "conversations": turns}) + "\n")
    steps = [
        ["import", str(here / "llava"), "--out", str(here / "imported")],
        [
            *("train", str(ROOT / "configs" / "finetune.yaml"), f"model.pretrained={here / 'imported'}"),
            *(f"data_root={rows}", "stages.chat.steps=20", "stages.chat.batch_size=8"),
            *("stages.chat.learning_rates.lora=1e-2", "threads=1", "--out", str(here / "run")),
        ],
        ["export", str(here / "run" / "model"), "--to", "llava-hf", "--out", str(here / "exported")],
    ]
    for arguments in steps:
        assert main(arguments) == 0, arguments
    return here


def test_what_was_learned_is_said_by_our_engine_and_by_transformers(journey: Path) -> None:
    model, processor = load(journey / "run" / "model")
    oracle, asked = Oracle(model, processor), cases(12)
    untouched = Oracle(*load(journey / "imported"))
    assert sum(oracle.answer(case) != untouched.answer(case) for case in asked) > 6  # it has learned something
    assert_same_tokens(oracle, asked, ask_engine(TorchEngine(model, processor, "mine"), oracle, asked))

    exported = AutoModelForImageTextToText.from_pretrained(journey / "exported", dtype=torch.float32).eval()
    preparing = AutoProcessor.from_pretrained(journey / "exported")
    theirs = []
    for case in asked:
        if "<" in case.text:
            continue  # transformers takes a mark that somebody wrote for one of its own
        parts = [{"type": "image", "image": image} for image in case.images]
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": case.text}]}]
        inputs = preparing.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = exported.generate(**inputs, max_new_tokens=oracle.max_tokens, do_sample=False)
        length = inputs["input_ids"].shape[1]
        theirs.append((case, (length, out[0, length:].tolist())))
    assert len(theirs) > 4
    assert_same_tokens(oracle, [case for case, _ in theirs], [answer for _, answer in theirs])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_learned_is_said_by_vllm(journey: Path, tmp_path: Path) -> None:
    oracle, asked = Oracle(*load(journey / "run" / "model")), cases()
    with serving(journey / "exported", tmp_path) as server:
        assert_same_tokens(oracle, asked, server.ask(asked))
