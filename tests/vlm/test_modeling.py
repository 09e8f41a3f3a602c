"""The training path: gradients with and without checkpointing, batches without images, frozen towers."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from tests.conftest import build_tiny_model
from tests.vlm.chats import PAIRS, pad_left, picture, user
from tests.vlm.conftest import LoadedModels
from vlm import VisionLanguageConfig, VisionLanguageModel, load
from vlm.configuration import Connector
from vlm.fusion import index_media
from vlm.modeling import decoder_layers
from vlm.projector import MLPProjector
from vlm.resampler import LATENT_STD
from vlm.vision import VisionTower

PROMPTS = [user(None, "what is this?"), user("here", None, "and there", None, "?"), user("no picture")]


def inputs_of(processor: Any) -> dict[str, torch.Tensor]:
    return {**pad_left(processor, PROMPTS), **processor.pixels([picture(n) for n in range(3)])}


def gradients(model: VisionLanguageModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dummy_image(model: VisionLanguageModel, processor: Any, text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A picture that no token refers to."""
    media_index, document_start = index_media(text["input_ids"], model.config.image_token_id, ())
    return {**processor.pixels([picture(1)]), "media_index": media_index, "document_start": document_start}


def test_a_copy_of_a_deep_model_attends_with_its_own_blocks(loaded_models: LoadedModels) -> None:
    model, processor = loaded_models("deep", "mlp")
    twin = copy.deepcopy(model)
    inputs = inputs_of(processor)
    with torch.no_grad():
        before = model(**inputs).logits
        for block in twin.cross_attention.values():
            block.attn_gate.zero_()
        assert torch.equal(model(**inputs).logits, before)
        assert not torch.equal(twin(**inputs).logits, before)


@pytest.mark.parametrize(
    ("fusion", "connector", "gated_ffn"),
    [*((*pair, "apply") for pair in PAIRS), ("deep", "mlp", "zero"), ("deep", "perceiver", "zero")],
)
def test_gradient_checkpointing_changes_no_gradient(
    loaded_models: LoadedModels, fusion: str, connector: str, gated_ffn: str
) -> None:
    shared, processor = loaded_models(fusion, connector)
    model = copy.deepcopy(shared).train()
    for block in model.cross_attention.values():
        block.zero_ffn_without_media = gated_ffn == "zero"
    inputs = inputs_of(processor)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    decoder_layers(model.language_model)[1].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = gradients(model, inputs)
    assert len(runs) == 2  # forwards, and once more in the backward
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    learns = {name.partition(".")[0] for name, gradient in plain.items() if gradient.abs().max() > 0}
    assert learns == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        *(["cross_attention"] if fusion == "deep" else []),
    }


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_a_batch_without_images_gives_the_connector_gradients_of_zero_and_the_same_logits(
    loaded_models: LoadedModels, fusion: str, connector: str
) -> None:
    model, processor = loaded_models(fusion, connector)
    text = pad_left(processor, [user("no picture"), user("none here either, and a longer text")])
    model.zero_grad()
    with_dummy = model(**text, **dummy_image(model, processor, text), labels=text["input_ids"])
    with_dummy.loss.backward()
    trained = {
        name: p.grad
        for name, p in model.named_parameters()
        if name.startswith(("multi_modal_projector", "vision_tower"))
    }
    unused = [name for name, gradient in trained.items() if gradient is None]
    assert all(name.startswith("vision_tower") for name in unused)  # layers above the one that is looked at
    assert any(name.startswith("vision_tower") and name not in unused for name in trained)
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in trained.values())
    assert all(p.grad is not None for p in model.cross_attention.parameters())
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        assert torch.equal(with_dummy.logits, model(**text).logits)


@pytest.mark.parametrize("ffn_without_media", ["apply", "zero"])
def test_deep_fusion_without_any_image_applies_or_skips_its_feed_forward(
    loaded_models: LoadedModels, ffn_without_media: str
) -> None:
    shared, processor = loaded_models("deep", "perceiver")
    settings = {**shared.config.to_diff_dict()["cross_attention"], "ffn_without_media": ffn_without_media}
    config = VisionLanguageConfig(**{**shared.config.to_diff_dict(), "cross_attention": settings})
    model = VisionLanguageModel(config).eval()
    model.load_state_dict(shared.state_dict())
    lm = AutoModelForCausalLM.from_config(model.config.text_config)
    lm.load_state_dict(model.language_model.state_dict())
    text = pad_left(processor, [user("no picture"), user("none here either, and a longer text")])
    with torch.no_grad():
        ours, shown = model(**text).logits, model(**text, **dummy_image(model, processor, text)).logits
        plain = lm.eval()(**text).logits
    assert torch.equal(ours, shown)
    assert torch.equal(ours, plain) == (ffn_without_media == "zero")


def test_a_frozen_tower_runs_without_a_graph_and_keeps_its_weights_out_of_the_gradients(
    loaded_models: LoadedModels,
) -> None:
    shared, processor = loaded_models("early", "mlp")
    model = copy.deepcopy(shared).train()
    model.vision_tower.requires_grad_(False)
    pixels = processor.pixels([picture(1)])["pixel_values"]
    assert model.vision_tower(pixels).grad_fn is None
    assert model.encode_images(pixels).tokens.grad_fn is not None
    assert not any(name.startswith("vision_tower") for name in gradients(model, inputs_of(processor)))


@pytest.mark.parametrize(("select", "first"), [("patch", 1), ("cls_patch", 0)])
@pytest.mark.parametrize("layer", [-1, -2, 0, [0, -1]], ids=str)
def test_the_tower_gives_the_hidden_states_that_are_asked_for(
    loaded_models: LoadedModels, select: str, first: int, layer: int | list[int]
) -> None:
    model, processor = loaded_models("early", "mlp")
    tower = VisionTower(model.config.vision_config, layer, select).eval()
    clip = CLIPVisionModel(model.config.vision_config).eval()
    clip.load_state_dict(tower.encoder.state_dict(), strict=True)
    pixels = processor.pixels([picture(1), picture(2)])["pixel_values"]
    with torch.no_grad():
        states = clip(pixels, output_hidden_states=True).hidden_states
        ours = tower(pixels)
    wanted = [states[one][:, first:] for one in ([layer] if isinstance(layer, int) else layer)]
    assert torch.equal(ours, torch.cat(wanted, dim=-1))
    assert tower.feature_size == ours.shape[-1]


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_pooling_averages_squares_of_patches_and_counts_its_tokens(pool: int, loaded_models: LoadedModels) -> None:
    torch.manual_seed(0)
    settings = Connector(depth=1, pool=pool)
    projector = MLPProjector(settings, 3, 5)
    features = torch.randn(2, 16, 3)
    rows = []
    for top in range(0, 4, pool):
        for left in range(0, 4, pool):
            square = [4 * y + x for y in range(top, min(4, top + pool)) for x in range(left, min(4, left + pool))]
            rows.append(features[:, square].mean(1))
    expected = torch.stack(rows, 1) @ projector.layers[0].weight.T + projector.layers[0].bias
    torch.testing.assert_close(projector(features), expected)
    shared, _ = loaded_models("early", "mlp")
    config = VisionLanguageConfig(**{**shared.config.to_diff_dict(), "connector": {"type": "mlp", "pool": pool}})
    assert config.image_tokens.visual(32, 40) == config.image_tokens.placeholders(32, 40) == len(rows)


def test_a_perceiver_over_squares_still_hands_out_its_latents(loaded_models: LoadedModels) -> None:
    shared, _ = loaded_models("deep", "perceiver")
    connector = {**shared.config.connector, "pool": 3, "pooling": "concat", "position_std": 1.0}
    model = VisionLanguageModel(VisionLanguageConfig(**{**shared.config.to_diff_dict(), "connector": connector}))
    assert model.config.squares_per_view == 4  # 4 x 4 patches, filled up at the edge
    assert model.multi_modal_projector.positions.shape[0] == 4
    size = model.config.vision_config.image_size
    visual = model.encode_images(torch.randn(2, 3, size, size))
    assert visual.lengths == (model.config.image_tokens.visual(32, 40),) * 2 == (connector["num_latents"],) * 2


@pytest.mark.parametrize("pool", [2, 3])
def test_concat_pooling_puts_the_patches_of_a_square_side_by_side(pool: int) -> None:
    torch.manual_seed(0)
    projector = MLPProjector(Connector(depth=1, pool=pool, pooling="concat"), 3, 5)
    features = torch.randn(2, 16, 3)
    rows = []
    for top in range(0, 4, pool):
        for left in range(0, 4, pool):
            square = torch.zeros(2, 3, pool, pool)  # what lies beyond the edge stays zero
            for y in range(top, min(4, top + pool)):
                for x in range(left, min(4, left + pool)):
                    square[:, :, y - top, x - left] = features[:, 4 * y + x]
            rows.append(square.flatten(1))
    expected = torch.stack(rows, 1) @ projector.layers[0].weight.T + projector.layers[0].bias
    torch.testing.assert_close(projector(features), expected)


def test_pooling_patches_with_a_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="square grid of patches, got 17"):
        MLPProjector(Connector(pool=2), 3, 5)(torch.randn(1, 17, 3))


@pytest.mark.parametrize("kind", ["mlp", "perceiver"])
def test_a_pool_that_no_grid_of_patches_allows_is_refused(kind: str) -> None:
    vision = {"image_size": 8, "patch_size": 2}
    with pytest.raises(ValueError, match=r"connector\.pool 2 takes squares of patches"):
        VisionLanguageConfig(
            vision_config=vision, connector={"type": kind, "pool": 2}, vision_feature_select="cls_patch"
        )
    with pytest.raises(ValueError, match=r"connector\.pool 5 is larger than the encoder's grid of 4 x 4 patches"):
        VisionLanguageConfig(vision_config=vision, connector={"type": kind, "pool": 5})
    assert VisionLanguageConfig(vision_config=vision, connector={"type": kind, "pool": 4}).squares_per_view == 1


def test_a_projector_may_be_linear() -> None:
    assert [type(layer).__name__ for layer in MLPProjector(Connector(depth=1), 3, 5).layers] == ["Linear"]


def test_a_new_models_gates_are_shut_and_its_latents_and_positions_drawn(loaded_models: LoadedModels) -> None:
    shared, _ = loaded_models("deep", "perceiver")
    connector = {**shared.config.connector, "position_std": 0.25, "num_latents": 64}
    torch.manual_seed(0)
    model = VisionLanguageModel(VisionLanguageConfig(**{**shared.config.to_diff_dict(), "connector": connector}))
    resampler: Any = model.multi_modal_projector
    assert resampler.latents.std().item() == pytest.approx(LATENT_STD, rel=0.1)
    assert resampler.positions.std().item() == pytest.approx(0.25, rel=0.15)
    assert all(block.attn_gate == 0 and block.ff_gate == 0 for block in model.cross_attention.values())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings_survive_saving(
    tmp_path: Path, tiny_tokenizer: Any, tied: bool, loaded_models: LoadedModels
) -> None:
    build_tiny_model(tmp_path / "model", tiny_tokenizer, "early", "mlp", tie_word_embeddings=tied)
    model, processor = load(tmp_path / "model")
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (shared, model.config.tie_word_embeddings) == (tied, tied)
    answer = model.generate(**inputs_of(processor), max_new_tokens=2, do_sample=False)
    assert answer.shape[0] == len(PROMPTS)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("qwen3", {"head_dim": 32}),
        ("mistral", {}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    ],
)
def test_deep_fusion_enters_other_families_of_language_models(
    loaded_models: LoadedModels, family: str, extra: dict[str, Any]
) -> None:
    shared, processor = loaded_models("deep", "perceiver")
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {key: getattr(shared.config.text_config, key) for key in keep}
    text |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1}
    settings = {**shared.config.to_diff_dict(), "text_config": {"model_type": family, **text, **extra}}
    torch.manual_seed(0)
    model = VisionLanguageModel(VisionLanguageConfig(**settings)).eval()
    for block in model.cross_attention.values():
        torch.nn.init.constant_(block.attn_gate, 0.5)
    inputs = inputs_of(processor)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    with torch.no_grad():
        blank = model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
        assert (model(**inputs).logits - blank).abs().max() > 1e-3


def test_an_lm_that_hides_its_layers_is_refused(tiny_models: Callable[[str, str], Path]) -> None:
    class Strange(nn.Module):
        config = SimpleNamespace(num_hidden_layers=3)

        def get_decoder(self) -> nn.Module:
            return self

    with pytest.raises(ValueError, match="Strange keeps its 3 decoder layers in an unknown place"):
        decoder_layers(Strange())
    strange = Strange()
    strange.these, strange.those = nn.ModuleList([nn.Identity()] * 3), nn.ModuleList([nn.Identity()] * 3)
    with pytest.raises(ValueError, match="in an unknown place"):
        decoder_layers(strange)
    strange.those = nn.ModuleList([nn.ModuleList([nn.Identity()] * 3)])  # lists within a list, as experts are
    assert decoder_layers(strange) is strange.these


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"connector": {"typ": "mlp"}}, "connector: typ: unknown setting; did you mean 'type'"),
        ({"connector": {"num_latents": 0}}, "connector: num_latents: 1 or more is needed"),
        ({"cross_attention": {"every": 0}}, "cross_attention: every: 1 or more is needed"),
        ({"cross_attention": {"attend": "first"}}, "attend"),
        ({"text_config": {"model_type": "nonesuch"}}, "unknown model_type 'nonesuch'"),
    ],
)
def test_settings_that_make_no_model_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VisionLanguageConfig(**change)
