"""Packed rows: the losses and the gradients of the same documents alone, in both fusions."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from data.collate import Batch, Sample, collate_chat, collate_text
from data.encode import IGNORED, Example, encode_record
from data.records import IMAGE_PART, Record, text_part
from vlm import UserError, load
from vlm.documents import packed_attention

TinyModels = Callable[[str, str], Path]
IMAGES = (1, 0, 2, 0, 1, 2, 0, 1)
# Of the largest gradient's norm. The most seen with three capabilities and one and two threads was 1.2e-8; 7.6e-6 of
# its own norm for a gradient that isn't rounding alone.
ROUNDING = 2e-7
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST)


def make_samples(processor: Any) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for number, count in enumerate(IMAGES):
        words = ["".join(rng.choice(list("abc "), int(rng.integers(3, 30)))) + "!" for _ in range(4)]
        messages = (
            {"role": "user", "content": [*[IMAGE_PART] * count, text_part(words[0])]},
            {"role": "assistant", "content": [text_part(words[1])]},
            {"role": "user", "content": [text_part(words[2])]},
            {"role": "assistant", "content": [text_part(words[3])]},
        )
        pictures = [picture(10 * number + n) for n in range(count)]
        record = Record(f"rows:{number}", messages, tuple(Path(f"{number}-{n}.png") for n in range(count)))
        example = encode_record(record, processor.chat, 512, "assistant", rng, processor.placeholders(pictures))
        samples.append(Sample(example, processor.pixels(pictures) if pictures else {}))
    return samples


def losses(model: Any, batch: Batch) -> torch.Tensor:
    """Of every supervised token, in order of the batch."""
    out = model(
        input_ids=batch.input_ids,
        **batch.pixels,
        media_index=batch.media_index,
        document_start=batch.document_start,
        **batch.packed,
        use_cache=False,
    )
    logits, labels = out.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)[labels != IGNORED]


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("fusion", "attend"), [("early", ""), ("deep", "last"), ("deep", "all")])
@pytest.mark.parametrize("connector", ["mlp", "perceiver"])
@pytest.mark.parametrize("rows", [((0, 1, 2), (3, 4, 5, 6), (7,)), ((0, 1, 2, 3, 4, 5, 6, 7),)])
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(
    tiny_models: TinyModels, fusion: str, connector: str, attend: str, rows: tuple[tuple[int, ...], ...]
) -> None:
    model, processor = load(tiny_models(fusion, connector))
    model.train()
    if fusion == "deep":
        model.config.cross_attention["attend"] = attend
        model.config.__dict__.pop("cross_attention_settings", None)
        assert model.config.cross_attention_settings.attend == attend
        with torch.no_grad():
            for block in model.cross_attention.values():
                block.attn_gate.fill_(0.5)
                block.ff_gate.fill_(0.5)
    samples = make_samples(processor)
    alone = torch.cat([losses(model, collate_chat([[sample]], processor)) for sample in samples])
    expected = gradients(model, alone.sum())
    batch = collate_chat([[samples[index] for index in row] for row in rows], processor, packed=True)
    with packed_attention(model.language_model):
        packed = losses(model, batch)
    assert packed.shape == alone.shape == (batch.supervised,)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    found = gradients(model, packed.sum())
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        # a key's bias changes no softmax: its gradient is rounding alone
        assert float((found[name] - gradient).norm()) <= max(1e-4 * float(gradient.norm()), ROUNDING * largest), name


def text_rows(vocabulary: int) -> list[list[Example]]:
    rng = np.random.default_rng(1)
    made = [Example(ids, ids, (), "") for ids in (rng.integers(1, vocabulary, n).tolist() for n in (7, 12, 1, 30, 5))]
    return [made[:3], made[3:]]


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 6},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "original_max_position_embeddings": 2048},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def language_model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **settings})).train()


@pytest.mark.parametrize("kind", FAMILIES)
def test_language_models_keep_documents_apart(kind: str) -> None:
    model = language_model(kind, **FAMILIES[kind])
    rows = text_rows(99)
    batch = collate_text(rows, pad=0, packed=True)
    with packed_attention(model), torch.no_grad():
        packed = model(input_ids=batch.input_ids, **batch.packed, use_cache=False).logits
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[number, start:end], alone, atol=1e-4, rtol=1e-4)
            start = end


@pytest.mark.parametrize("kind", ["mpt", "bloom"])
def test_a_model_that_cannot_be_packed_is_refused(kind: str) -> None:
    settings = {"mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2}, "bloom": {"n_head": 2, "n_layer": 2}}[kind]
    model = language_model(kind, **settings)
    usual = model.config._attn_implementation
    with pytest.raises(UserError, match="can't be packed"), packed_attention(model):
        pass
    assert model.config._attn_implementation == usual
    assert model.training


def test_without_its_documents_the_attention_says_so() -> None:
    model = language_model("llama")
    with packed_attention(model), pytest.raises(ValueError, match="isn't told where documents begin"):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    with nullcontext(), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


@pytest.mark.slow  # it is compiled first
def test_flex_attention_keeps_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA takes without FlashAttention, as far as the CPU has it: the forward."""
    model = language_model("llama", num_key_value_heads=1)
    monkeypatch.setattr("vlm.documents._implementation", lambda *_: "flex_attention")
    rows = text_rows(99)
    batch = collate_text(rows, pad=0, packed=True)
    with packed_attention(model), torch.no_grad():
        packed = model(input_ids=batch.input_ids, **batch.packed, use_cache=False).logits
    alone = model(input_ids=torch.tensor([rows[0][1].input_ids]), use_cache=False).logits[0]
    torch.testing.assert_close(packed[0, 7:19], alone, atol=1e-4, rtol=1e-4)
