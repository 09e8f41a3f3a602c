"""Tiny random models of every kind that vLLM serves, and what their own `generate` says."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from serve.engine import Request, SamplingParams
from serve.media import prepare_image
from serve.torch_engine import TorchEngine
from tests.conftest import CONTEXT, TEXTS
from tests.serve.helpers import picture, run
from train.adapters import save_adapter
from vlm import VisionLanguageConfig, VisionLanguageModel, VisionLanguageProcessor, load, save
from vlm.processing import make_processor
from vlm.tokenization import IMAGE_TOKEN, train_tokenizer

SIZES = ((40, 50), (64, 32), (30, 90), (200, 12), (33, 31), (128, 128), (1, 1))
CLIP = {"model_type": "clip_vision_model", "initializer_factor": 4.0}
SIGLIP = {"model_type": "siglip_vision_model", "initializer_range": 0.2}
DINO = {"model_type": "dinov2", "initializer_range": 0.2}
LLAMA = {"model_type": "llama", "num_key_value_heads": 1}
GATED = {"heads": 2, "head_dim": 16, "ff_mult": 2}
# kind -> what differs from an MLP on CLIP and Llama
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"vision_feature_layer": [-2, -1]},
    "anyres, two towers, pixel shuffle": {
        "vision_config": SIGLIP,
        "second_vision_config": {**DINO, "patch_size": 16},
        "connector": {"pool": 2, "pooling": "concat", "depth": 3, "activation": "silu", "bias": False},
        "tiling": {"mode": "anyres"},
        "text_config": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    },
    "perceiver, tiles": {
        "vision_config": DINO,
        "connector": {"type": "perceiver", "num_latents": 5, "heads": 2, "head_dim": 16, "position_std": 0.1},
        "tiling": {"mode": "tiles"},
        "text_config": {"model_type": "gemma3_text", "head_dim": 32, "num_key_value_heads": 1, "sliding_window": 64},
    },
    "pooled average, class token off, one layer": {
        "vision_config": CLIP,
        "connector": {"pool": 3, "pooling": "average", "depth": 1},
        "text_config": {"model_type": "gpt_neox"},
    },
    "deep, mlp": {"fusion": "deep", "cross_attention": {**GATED, "every": 1}},
    "deep, perceiver, all images": {
        "fusion": "deep",
        "cross_attention": {**GATED, "every": 2, "attend": "all", "ffn_without_media": "zero"},
        "connector": {"type": "perceiver", "num_latents": 5, "heads": 2, "head_dim": 16},
        "text_config": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    },
    "llava": {},
    "llava next": {"tiling": {"mode": "anyres"}},
    "class token": {"vision_feature_select": "cls_patch", "text_config": {"model_type": "phi3"}},
}


def build(folder: Path, kind: str) -> None:
    """Saves a random float32 model whose answers depend on its images."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=320, context=CONTEXT)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    settings = dict(KINDS[kind])
    settings["vision_config"] = {**vision, **settings.get("vision_config", CLIP)}
    if "second_vision_config" in settings:
        settings["second_vision_config"] = {**vision, **settings["second_vision_config"]}
    settings["text_config"] = {**text, **settings.get("text_config", LLAMA)}
    config = VisionLanguageConfig(image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionLanguageModel(config)
    # as large as the embeddings of words, or as what is normalised, so that an image changes what is said
    with torch.no_grad():
        processor = make_processor(config, tokenizer)
        wanted = 1.0 if config.fusion == "deep" else model.get_input_embeddings().weight.std()
        last = [m for m in model.multi_modal_projector.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight.mul_(wanted / model.encode_images(**processor.pixels([picture(0)])).tokens.std())
        for block in model.cross_attention.values():  # shut, as at the start of training, they let no image through
            block.attn_gate.fill_(1.0)
            block.ff_gate.fill_(0.2)
    save(model, processor, folder)


def add_adapter(model: Path, folder: Path, targets: str) -> None:
    """Saves a random LoRA folder that changes what the model says. targets: a pattern of the layers that it changes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(load(model)[0], LoraConfig(r=4, target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(adapted, folder, str(model))


@dataclass(frozen=True)
class Case:
    text: str
    images: tuple[Image.Image, ...]


def cases(count: int = 51, most: int = 2) -> list[Case]:
    """Questions with none to `most` images of all shapes, some with control tokens in what is said."""
    numbers = random.Random(0)
    found = []
    for index in range(count):
        images = tuple(picture(3 * index + k, *numbers.choice(SIZES)) for k in range(index % (most + 1)))
        said = numbers.choice(["what is it?", "is <image> here?", "how many <|end|> are left?", "say it again: "])
        found.append(Case(f"{index} {said}", images))
    return found


@dataclass(frozen=True)
class Expected:
    prompt_tokens: int
    output: list[int]


class Oracle:
    """Our own model and its greedy answers."""

    def __init__(self, model: VisionLanguageModel, processor: VisionLanguageProcessor, max_tokens: int = 24) -> None:
        self.model, self.processor, self.max_tokens = model, processor, max_tokens

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        parts = [*[{"type": "image"}] * len(case.images), {"type": "text", "text": case.text}]
        content = parts if case.images else case.text
        chat = self.processor.chat.encode(
            [{"role": "user", "content": content}], self.processor.placeholders(case.images), add_generation_prompt=True
        )
        pixels = self.processor.pixels(case.images) if case.images else {}
        return {"input_ids": torch.tensor([chat.input_ids]), **pixels}

    @torch.no_grad()
    def answer(self, case: Case) -> Expected:
        inputs = self.inputs(case)
        length = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=self.max_tokens,
            do_sample=False,
        )
        return Expected(length, out[0, length:].tolist())

    @torch.no_grad()
    def gap(self, case: Case, said: Sequence[int]) -> float:
        """By how much the likeliest next token leads after `said`."""
        inputs = self.inputs(case)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(said)], dtype=torch.long)], dim=1)
        first, second = self.model(**inputs).logits[0, -1].topk(2).values.tolist()
        return first - second


def ask_engine(engine: TorchEngine, oracle: Oracle, asked: Sequence[Case]) -> list[tuple[int, list[int]]]:
    """For each case the number of its prompt's tokens and the greedy answer's, all under way at a time."""
    requests = [
        Request(
            id=str(number),
            input_ids=oracle.inputs(case)["input_ids"][0].tolist(),
            images=tuple(prepare_image(image, oracle.processor) for image in case.images),
            sampling=SamplingParams(temperature=0.0, max_tokens=oracle.max_tokens),
        )
        for number, case in enumerate(asked)
    ]
    engine.start()
    answers = [ids for [(ids, _, _)] in run(engine, *requests)]
    engine.stop()
    return [(len(request.input_ids), ids) for request, ids in zip(requests, answers, strict=True)]


def assert_same_tokens(oracle: Oracle, asked: Sequence[Case], got: Sequence[tuple[int, list[int]]]) -> None:
    """Greedy tokens equal the oracle's, or diverge first where its two best logits are within 1e-3, in 2 % at most."""
    diverged = []
    for case, (prompt_tokens, output) in zip(asked, got, strict=True):
        expected = oracle.answer(case)
        assert prompt_tokens == expected.prompt_tokens, case
        if output == expected.output:
            continue
        pairs = enumerate(zip(output, expected.output, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(output), len(expected.output)))
        gap = oracle.gap(case, expected.output[:first])
        assert gap < 1e-3, f"{case}: token {first} differs, where the oracle's best leads by {gap}"
        diverged.append(case)
    assert len(diverged) <= 0.02 * len(asked), diverged
