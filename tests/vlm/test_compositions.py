"""Any encoder with any language model, in either fusion: what each part gets is what transformers gives alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from tests.vlm.chats import picture
from tests.vlm.test_vision import ENCODERS, VISION, bilinear
from vlm import VisionLanguageConfig, VisionLanguageModel, load, save
from vlm.processing import make_processor

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 1}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "mistral": {**GROUPED, "sliding_window": None},
    "phi3": GROUPED,
    "gemma3_text": {**GROUPED, "head_dim": 16},  # scaled embeddings, windows in some layers
    "smollm3": GROUPED,
    "gpt_neox": TEXT,  # other names everywhere, attention and MLP side by side
    # these two hand nothing on to their layers
    "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128, "initializer_range": 0.3},
    "falcon": TEXT,
    "opt": {**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
}
IMAGE = 9


def compose(
    encoder: str = "clip_vision_model", lm: str = "llama", fusion: str = "early", **changes: Any
) -> VisionLanguageModel:
    config = VisionLanguageConfig(
        vision_config={"model_type": encoder, **ENCODERS[encoder][0]},
        text_config={"model_type": lm, **LANGUAGE_MODELS[lm]},
        fusion=fusion,
        cross_attention={"heads": 2, "head_dim": 16} if fusion == "deep" else None,
        image_token_id=IMAGE,
        **changes,
    )
    torch.manual_seed(0)
    model = VisionLanguageModel(config).eval()
    for block in model.cross_attention.values():
        torch.nn.init.constant_(block.attn_gate, 0.5)
        torch.nn.init.constant_(block.ff_gate, 0.5)
    return model


def prompts(model: VisionLanguageModel) -> list[list[int]]:
    """Rows with one image, two and none."""
    image = [IMAGE] * model.config.image_tokens.placeholders(32, 32)
    return [[2, *image, 3, 4], [5, *image, 6, *image, 7, 8, 11], [12, 13, 14]]


@pytest.mark.parametrize("fusion", ["early", "deep"])
@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
def test_a_padded_batch_decodes_as_its_rows_alone_without_a_cache(lm: str, fusion: str) -> None:
    model = compose(lm=lm, fusion=fusion)
    rows, pixels = prompts(model), torch.randn(3, 3, 32, 32)
    shown = [pixels[:1], pixels[1:], None]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    together = model.generate(
        ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE]
    )
    for row, images, answer in zip(rows, shown, together[:, width:].tolist(), strict=True):
        said: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row + said]), pixel_values=images, use_cache=False).logits
            logits[..., IMAGE] = -torch.inf
            said.append(int(logits[0, -1].argmax()))
        assert said == answer
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE], "cache_implementation": "static"}
    assert torch.equal(model.generate(ids, attention_mask=mask, pixel_values=pixels, **options), together)


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
def test_early_fusion_is_the_lm_over_the_images_vectors(lm: str) -> None:
    model = compose(lm=lm)
    ids, pixels = torch.tensor([prompts(model)[1]]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        embeddings[ids == IMAGE] = model.encode_images(pixels).tokens
        expected = model.language_model(inputs_embeds=embeddings).logits
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, expected)
        other = model(input_ids=ids, pixel_values=pixels.flip(0)).logits
    assert (other - expected)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
def test_deep_fusion_with_closed_gates_is_the_lm_and_with_open_ones_sees(lm: str) -> None:
    model = compose(lm=lm, fusion="deep")
    ids, pixels = torch.tensor([prompts(model)[1]]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen, other = (model(input_ids=ids, pixel_values=images).logits for images in (pixels, pixels.flip(0)))
        assert (seen - other)[0, -1].abs().max() > 1e-4
        for block in model.cross_attention.values():
            block.attn_gate.zero_()
            block.ff_gate.zero_()
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, model.language_model(ids).logits)


@pytest.mark.parametrize("lm", ["mpt", "llama"])
def test_recomputed_layers_see_what_they_saw_or_say_that_they_cant(lm: str) -> None:
    model = compose(lm=lm, fusion="deep").train()
    ids, pixels = torch.tensor([prompts(model)[1]]), torch.randn(2, 3, 32, 32)
    gate = model.cross_attention["0"].attn_gate
    expected = torch.autograd.grad(model(ids, pixel_values=pixels, labels=ids, use_cache=False).loss, gate)[0]
    assert expected.abs() > 1e-6
    model.gradient_checkpointing_enable()
    if lm == "mpt":
        with pytest.raises(ValueError, match="turn gradient checkpointing off"):
            model(ids, pixel_values=pixels, labels=ids, use_cache=False)
        return
    again = torch.autograd.grad(model(ids, pixel_values=pixels, labels=ids, use_cache=False).loss, gate)[0]
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize(
    ("connector", "tiling"), [("mlp", "none"), ("perceiver", "none"), ("mlp", "anyres"), ("mlp", "tiles")]
)
def test_two_towers_each_see_the_picture_in_their_own_way(
    connector: str, tiling: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    second = {"model_type": "dinov2", **VISION, "image_size": 48}
    model = compose(
        "siglip_vision_model",
        second_vision_config=second,
        second_vision_feature_layer=-1,
        connector={"type": connector, "num_latents": 3, "depth": 1},
        tiling={"mode": tiling, "pinpoints": [[32, 64], [64, 32]]},
    )
    model.config.text_config.eos_token_id = 1
    processor = make_processor(model.config, tiny_tokenizer)
    save(model, processor, tmp_path / "model")
    model, processor = load(tmp_path / "model")
    pictures = [picture(1, 60, 30), picture(2, 30, 60)]
    pixels = processor.pixels(pictures)
    views = sum(model.config.image_tokens.views(image.height, image.width) for image in pictures)
    assert pixels["pixel_values"].shape == (views, 3, 32, 32)
    assert pixels["second_pixel_values"].shape == (views, 3, 48, 48)
    siglip, dino = (
        AutoModel.from_config(model.config.vision_config),
        AutoModel.from_config(model.config.second_vision_config),
    )
    siglip.load_state_dict(model.vision_tower.encoder.state_dict())
    dino.load_state_dict(model.second_vision_tower.encoder.state_dict())
    with torch.no_grad():
        ours = model.encode_images(**pixels)
        one = siglip.eval()(pixels["pixel_values"], output_hidden_states=True).hidden_states[-2]
        two = dino.eval()(pixels["second_pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]
        shrunk = torch.stack([bilinear(view.unflatten(0, (6, 6)), 4).flatten(0, 1) for view in two])
        features = model.multi_modal_projector(torch.cat([one, shrunk], dim=-1))
        sizes = [(image.height, image.width) for image in pictures]
        expected, lengths = model.config.image_tokens.arrange(features, sizes, model.image_newline)
        torch.testing.assert_close(ours.tokens, expected, rtol=0, atol=3e-5)  # 2.9e-6 was seen
        assert ours.lengths == lengths == tuple(processor.placeholders(pictures))
        changed = {**pixels, "second_pixel_values": torch.zeros_like(pixels["second_pixel_values"])}
        assert (model.encode_images(**changed).tokens - ours.tokens).abs().max() > 1e-3
    with pytest.raises(ValueError, match="two vision encoders"):
        model.encode_images(pixels["pixel_values"], pixels["image_sizes"])


def test_an_8b_composition_is_built_on_the_meta_device_in_seconds() -> None:
    config = VisionLanguageConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    )
    start = time.perf_counter()
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 8e9
    assert time.perf_counter() - start < 5
