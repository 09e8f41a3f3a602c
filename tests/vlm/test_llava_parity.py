"""Early fusion with an MLP is LLaVA: the logits of transformers' own class, and what it refuses."""

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.vlm.chats import pad_left, picture, user
from tests.vlm.conftest import LoadedModels
from vlm import VisionLanguageConfig, VisionLanguageModel
from vlm.processing import make_processor

KEYS = {
    "vision_tower.encoder.": "model.vision_tower.",
    "multi_modal_projector.layers.0.": "model.multi_modal_projector.linear_1.",
    "multi_modal_projector.layers.2.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "image_newline": "model.image_newline",
}
STRATEGY = {"patch": "default", "cls_patch": "full"}


def as_llava(model: VisionLanguageModel) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the same weights, every key of both used."""
    config = model.config
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=STRATEGY[config.vision_feature_select],
            image_seq_length=config.image_tokens.per_view,
        )
    )
    llava.load_state_dict(llava_weights(model), strict=True)
    return llava.eval()


def llava_weights(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of transformers' LLaVA classes."""
    weights = {}
    for key, tensor in model.state_dict().items():
        ours, theirs = next(pair for pair in KEYS.items() if key.startswith(pair[0]))
        weights[theirs + key.removeprefix(ours)] = tensor
    return weights


def of_llava(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA-1.5 has no use for the images' sizes."""
    return {name: tensor for name, tensor in inputs.items() if name != "image_sizes"}


@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-2, [-2, -1], 1], ids=str)
def test_logits_equal_transformers_llava(loaded_models: LoadedModels, layer: int | list[int], select: str) -> None:
    base, processor = loaded_models("early", "mlp")
    settings = {**base.config.to_diff_dict(), "vision_feature_layer": layer, "vision_feature_select": select}
    config = VisionLanguageConfig(**settings)
    torch.manual_seed(0)
    model = VisionLanguageModel(config).eval()
    processor = make_processor(config, processor.tokenizer)
    prompts = [user(None, "what is this?"), user("here", None, "and there", None, "?"), user("no picture")]
    inputs = {**pad_left(processor, prompts), **processor.pixels([picture(n) for n in range(3)])}
    assert config.image_tokens.placeholders(32, 40) == {"patch": 16, "cls_patch": 17}[select]
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, as_llava(model)(**of_llava(inputs)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        assert (model(**blank).logits - ours)[real].abs().max() > 1e-2  # the pictures matter


def test_cached_decoding_of_a_padded_batch_equals_transformers_llava(loaded_models: LoadedModels) -> None:
    model, processor = loaded_models("early", "mlp")
    prompts = [user(None, "what is this?"), user("here", None, "and there", None, "?"), user("no picture")]
    inputs = {**pad_left(processor, prompts), **processor.pixels([picture(n) for n in range(3)])}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": True}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    ours, theirs = model.generate(**inputs, **options), as_llava(model).generate(**of_llava(inputs), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-5)


def test_loss_equals_transformers_llava(loaded_models: LoadedModels) -> None:
    model, processor = loaded_models("early", "mlp")
    inputs = {**pad_left(processor, [user(None, "what is this?")]), **processor.pixels([picture(1)])}
    labels = inputs["input_ids"].clone()
    labels[:, :18] = -100
    with torch.no_grad():
        ours, theirs = model(**inputs, labels=labels).loss, as_llava(model)(**of_llava(inputs), labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_more_or_fewer_pictures_than_placeholders_are_refused_with_both_counts(
    loaded_models: LoadedModels, fusion: str
) -> None:
    model, processor = loaded_models(fusion, "mlp")
    each = model.config.image_tokens.placeholders(32, 40)
    inputs = pad_left(processor, [user(None, "what is this?")])
    for count in (0, 2):
        pixels = processor.pixels([picture(n) for n in range(count)]) if count else {}
        with pytest.raises(ValueError, match=f"{each} image tokens, but its {count} images need {each * count}"):
            model(**inputs, **pixels)


def test_images_whose_places_cannot_be_found_are_refused(loaded_models: LoadedModels) -> None:
    model, processor = loaded_models("early", "mlp")
    inputs = pad_left(processor, [user(None, "what is this?")])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="images need input_ids"):
        model(inputs_embeds=embeddings, **processor.pixels([picture(1)]))
    cache = model(input_ids=torch.tensor([[20, 21]]), use_cache=True).past_key_values
    for count in (2, 3):
        pixels = processor.pixels([picture(n) for n in range(count)])
        with pytest.raises(ValueError, match=f"16 image tokens, but its {count} images need {16 * count}"):
            model(input_ids=inputs["input_ids"], past_key_values=cache, **pixels)
