"""transformers' Auto classes and its own ways of using a processor."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, pipeline

from tests.vlm.chats import pad_left, picture, user
from tests.vlm.conftest import LoadedModels

AUTO = """
import json, sys, torch
import vlm.auto
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
told = []
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    others = [kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoModel)]
    kinds = [AutoConfig.from_pretrained(folder), model, *others, processor]
    from PIL import Image
    chat = [{"role": "user", "content": [
        {"type": "image", "image": Image.new("RGB", (40, 32), (9, 200, 30))}, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    told.append([[type(kind).__name__ for kind in kinds], out[0].tolist()])
print(json.dumps(told))
"""


PAIRS = [("early", "mlp"), ("deep", "perceiver")]


def test_auto_classes_load_every_kind_of_saved_folder(
    tiny_models: Callable[[str, str], Path], loaded_models: LoadedModels
) -> None:
    folders = [str(tiny_models(*pair)) for pair in PAIRS]
    # a fresh process: in this one the classes are registered already
    run = subprocess.run([sys.executable, "-c", AUTO, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for pair, (kinds, out) in zip(PAIRS, json.loads(run.stdout), strict=True):
        assert kinds == ["VisionLanguageConfig", *["VisionLanguageModel"] * 3, "VisionLanguageProcessor"]
        model, processor = loaded_models(*pair)
        ids = pad_left(processor, [user(None, "what?")])["input_ids"]
        pixels = processor.pixels([Image.new("RGB", (40, 32), (9, 200, 30))])
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, **options)
        assert out == expected[0].tolist()


def test_pixels_equal_clips_own_preprocessing(loaded_models: LoadedModels) -> None:
    _, processor = loaded_models("early", "mlp")
    pictures = [picture(1, 50, 40), picture(2, 20, 90)]
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = np.stack(clip(pictures, return_tensors="np")["pixel_values"])
    ours = processor.pixels(pictures)["pixel_values"]
    assert ours.shape == (2, 3, 32, 32)
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy(), expected)
    shrunk = pictures[0].resize((40, 32), 3).crop((4, 0, 36, 32))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    by_hand = ((np.asarray(shrunk) / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(ours[0].numpy(), by_hand, atol=1e-5)


@pytest.mark.parametrize(("fusion", "each"), [("early", 4), ("deep", 1)])
def test_a_call_as_transformers_makes_it_counts_image_tokens(
    loaded_models: LoadedModels, fusion: str, each: int
) -> None:
    model, processor = loaded_models(fusion, "perceiver")
    assert processor.image_tokens == model.config.image_tokens
    assert processor.placeholders([picture(1)]) == [each]
    texts = ["<image> a", "a <image> b <image>"]
    nested: Any = [[picture(1)], [picture(2), picture(3)]]
    data = processor(images=nested, text=texts, padding=True)
    assert (data["input_ids"] == processor.image_token_id).sum(1).tolist() == [each, 2 * each]
    assert data["pixel_values"].shape[0] == 3
    assert torch.equal(data["pixel_values"], processor.pixels([picture(n) for n in (1, 2, 3)])["pixel_values"])
    model(**data)
    assert "pixel_values" not in processor(text="no picture")
    assert "input_ids" not in processor(images=picture(1))
    assert set(processor.model_input_names) == {*data} == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}


@pytest.mark.parametrize("pair", PAIRS)
def test_transformers_own_pipeline_answers_as_generate(
    tiny_models: Callable[[str, str], Path], loaded_models: LoadedModels, pair: tuple[str, str]
) -> None:
    model, processor = loaded_models(*pair)
    answers = pipeline("image-text-to-text", model=str(tiny_models(*pair)))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    chats = []
    for seed, text in enumerate(["what?", "what is this thing?"]):
        content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": text}]
        chats.append([{"role": "user", "content": content}])
    found = [record[0]["generated_text"][-1] for record in answers(chats, batch_size=2, generate_kwargs=options)]
    inputs = {**pad_left(processor, chats), **processor.pixels([picture(0), picture(1)])}
    out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    assert found == [{"role": "assistant", "content": text} for text in said]
    assert said[0] != said[1]
