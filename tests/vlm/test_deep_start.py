"""Before its first step a deep-fusion model is the text LM, to the bit, and its saved LM is a plain one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.vlm.chats import pad_left, picture, user
from tests.vlm.conftest import LoadedModels
from vlm import VisionLanguageModel, save


@pytest.mark.parametrize("connector", ["mlp", "perceiver"])
def test_a_fresh_deep_model_equals_the_plain_lm_exactly_with_images_present(
    loaded_models: LoadedModels, connector: str
) -> None:
    base, processor = loaded_models("deep", connector)
    torch.manual_seed(5)
    model = VisionLanguageModel(base.config).eval()
    lm = AutoModelForCausalLM.from_config(model.config.text_config)
    lm.load_state_dict(model.language_model.state_dict(), strict=True)
    lm.eval()
    prompts = [user(None, "what is this?"), user("here", None, "and there", None, "?"), user("no picture")]
    inputs = pad_left(processor, prompts)
    pixels = processor.pixels([picture(n) for n in range(3)])
    with torch.no_grad():
        assert torch.equal(model(**inputs, **pixels).logits, lm(**inputs).logits)
        for block in model.cross_attention.values():
            assert (block.attn_gate.item(), block.ff_gate.item()) == (0.0, 0.0)
            block.attn_gate.fill_(0.5)
        assert not torch.equal(model(**inputs, **pixels).logits, lm(**inputs).logits)


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_the_saved_lm_keys_are_the_plain_lms(loaded_models: LoadedModels, fusion: str, tmp_path: Path) -> None:
    model, processor = loaded_models(fusion, "perceiver")
    save(model, processor, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    prefix = "language_model."
    weights = {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}
    lm = AutoModelForCausalLM.from_config(model.config.text_config)
    lm.load_state_dict(weights, strict=True)
    assert {key.partition(".")[0] for key in saved} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        *(["cross_attention"] if fusion == "deep" else []),
    }
