"""Which of an encoder's vectors are patches, and which of its layers there are."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, PreTrainedConfig, SiglipVisionConfig

from vlm.vision import VisionTower

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 32, "patch_size": 8, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("config", "before"),
    [(CLIPVisionConfig(**SIZES), 1), (SiglipVisionConfig(**SIZES), 0), (Dinov2WithRegistersConfig(**SIZES), 5)],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_every_patch_and_nothing_else_is_kept(config: PreTrainedConfig, before: int) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    tower = VisionTower(config, -1, "patch").eval()
    last = tower.encoder(pixels, output_hidden_states=True).hidden_states[-1]
    assert last.shape[1] == before + 16
    assert torch.equal(tower(pixels), last[:, before:])
    with_class_token = VisionTower(config, -1, "cls_patch")
    if before == 1:
        assert with_class_token(pixels).shape == (1, 17, 32)
    else:
        with pytest.raises(ValueError, match=f"needs one class token, and this encoder has {before}"):
            with_class_token(pixels)


@pytest.mark.parametrize("layers", [3, -4, [0, 9]])
def test_a_layer_that_the_encoder_lacks_is_refused(layers: int | list[int]) -> None:
    with pytest.raises(ValueError, match="has the 3 layers 0 to 2"):
        VisionTower(CLIPVisionConfig(**SIZES), layers, "patch")
