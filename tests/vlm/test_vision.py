"""Encoders: their own patches, their own preprocessing, and two of them side by side."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

from tests.vlm.chats import picture
from vlm import VisionLanguageConfig
from vlm.encoders import make_image_processor, restore_image_processor
from vlm.vision import VisionTower, merge_towers

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
NAFLEX = {**{name: value for name, value in VISION.items() if name != "image_size"}, "num_patches": 16}
# every encoder, and how many tokens it puts before the patches
ENCODERS: dict[str, tuple[dict[str, Any], int]] = {
    "clip_vision_model": ({**VISION, "intermediate_size": 48}, 1),
    "siglip_vision_model": ({**VISION, "intermediate_size": 48}, 0),
    "siglip2_vision_model": ({**NAFLEX, "intermediate_size": 48}, 0),
    "dinov2": (VISION, 1),
    "dinov2_with_registers": ({**VISION, "num_register_tokens": 3}, 4),
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_tower_gives_the_encoders_own_patches(encoder: str) -> None:
    settings, before = ENCODERS[encoder]
    torch.manual_seed(0)
    config = VisionLanguageConfig(vision_config={"model_type": encoder, **settings}).vision_config
    tower = VisionTower(config, [-2, 0], "patch").eval()
    alone = AutoModel.from_config(config).eval()
    alone.load_state_dict(tower.encoder.state_dict(), strict=True)
    pictures = [picture(1, 32, 32), picture(2, 32, 32)]
    processor: Any = make_image_processor(config, {})
    pixels = torch.from_numpy(np.stack(processor(pictures, return_tensors="np")["pixel_values"]))
    if encoder == "siglip2_vision_model":
        naflex = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        inputs = dict(naflex(pictures, return_tensors="pt"))
    else:
        inputs = {"pixel_values": pixels}
    with torch.no_grad():
        states = alone(**inputs, output_hidden_states=True).hidden_states
        ours = tower(pixels)
    expected = torch.cat([states[-2], states[0]], dim=-1)[:, before:]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert ours.shape == (2, 16, 64)
    if before == 1:
        assert VisionTower(config, -1, "cls_patch")(pixels).shape == (2, 17, 32)
    else:
        with pytest.raises(ValueError, match=f"needs one class token, and this encoder has {before}"):
            VisionTower(config, -1, "cls_patch")(pixels)


OWN = {
    "clip_vision_model": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "siglip_vision_model": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "dinov2": BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
}


@pytest.mark.parametrize("encoder", OWN)
def test_pictures_are_prepared_as_the_encoder_was_trained(encoder: str) -> None:
    config: Any = VisionLanguageConfig(vision_config={"model_type": encoder, **ENCODERS[encoder][0]}).vision_config
    ours: Any = make_image_processor(config, {})
    theirs: Any = OWN[encoder]
    photo = picture(3, 50, 40)
    expected = theirs([photo], return_tensors="np")["pixel_values"]
    assert np.array_equal(ours([photo], return_tensors="np")["pixel_values"], expected)
    again: Any = restore_image_processor(ours.to_dict())
    assert np.array_equal(again([photo], return_tensors="np")["pixel_values"], expected)
    brighter: Any = make_image_processor(config, {"image_mean": [0.0, 0.0, 0.0]})
    assert not np.array_equal(brighter([photo], return_tensors="np")["pixel_values"], expected)
    with pytest.raises(ValueError, match="'image_mea' is unknown; did you mean 'image_mean'"):
        make_image_processor(config, {"image_mea": 0})


def squared(photo: Image.Image, fit: str, fill: tuple[int, ...], filter: int) -> Image.Image:
    """What each fit must make of a picture, with Pillow alone."""
    width, height = photo.size
    if fit == "stretch":
        return photo.resize((32, 32), filter)
    if fit == "pad":
        whole = Image.new("RGB", (max(width, height),) * 2, fill)
        whole.paste(photo, ((max(width, height) - width) // 2, (max(width, height) - height) // 2))
        return whole.resize((32, 32), filter)
    scale = 32 / min(width, height)
    scaled = photo.resize((int(width * scale), int(height * scale)), filter)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    return scaled.crop((left, top, left + 32, top + 32))


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("encoder", OWN)
def test_a_picture_fits_into_its_square_as_the_settings_say(encoder: str, fit: str) -> None:
    config: Any = VisionLanguageConfig(vision_config={"model_type": encoder, **ENCODERS[encoder][0]}).vision_config
    theirs: Any = OWN[encoder]
    ours: Any = make_image_processor(config, {"fit": fit})
    for photo in (picture(3, 64, 48), picture(4, 33, 90), picture(5, 32, 32)):
        fill = tuple(int(value * 255) for value in theirs.image_mean)
        square = np.asarray(squared(photo, fit, fill, theirs.resample), dtype=np.float32) / 255
        expected = ((square - theirs.image_mean) / theirs.image_std).transpose(2, 0, 1)
        made = ours([photo], return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(made, expected, atol=1e-5)
        again: Any = restore_image_processor(ours.to_dict())
        assert np.array_equal(again([photo], return_tensors="np")["pixel_values"][0], made)
    with pytest.raises(ValueError, match="fit 'pat' is unknown; did you mean 'pad'"):
        make_image_processor(config, {"fit": "pat"})


IN_A_ROW = """
import resource, sys
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vlm import VisionLanguageConfig
from vlm.processing import make_processor

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template="x")
image = Image.new("RGB", (50_000_000, 1), (250, 10, 10))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for vision in eval(sys.argv[1]):
    pixels = make_processor(VisionLanguageConfig(vision_config=vision), tokenizer).pixels([image])["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels[0, 0].min() > pixels[0, 1].max()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_picture_of_fifty_megapixels_in_a_row_is_prepared_in_little_memory() -> None:
    settings = [{"model_type": encoder, **ENCODERS[encoder][0]} for encoder in OWN]
    command = [sys.executable, "-c", IN_A_ROW, repr(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600_000  # kilobytes; the picture itself has 200 MB


@pytest.mark.parametrize(
    "vision",
    [
        {"model_type": "vit", **VISION},
        {"image_size": [32, 64], "patch_size": 8},
        {"model_type": "siglip2_vision_model", "num_patches": 15},
    ],
    ids=["unknown kind", "no square", "no square number"],
)
def test_encoders_that_are_not_known_to_work_are_refused(vision: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="vision encoder"):
        VisionLanguageConfig(vision_config=vision)


def bilinear(grid: torch.Tensor, side: int) -> torch.Tensor:
    """[n, n, D] -> [side, side, D], each new point between the four old ones around its centre."""
    old = grid.shape[0]
    out = torch.zeros(side, side, grid.shape[2])
    places = [min(max((i + 0.5) * old / side - 0.5, 0), old - 1) for i in range(side)]
    for row, y in enumerate(places):
        for column, x in enumerate(places):
            for near_y, weight_y in ((int(y), 1 - y % 1), (min(int(y) + 1, old - 1), y % 1)):
                for near_x, weight_x in ((int(x), 1 - x % 1), (min(int(x) + 1, old - 1), x % 1)):
                    out[row, column] += weight_y * weight_x * grid[near_y, near_x]
    return out


@pytest.mark.parametrize("other", [2, 3, 4, 6])
def test_a_second_encoders_grid_is_resized_to_the_first_and_joined(other: int) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 16, 5), torch.randn(2, other**2, 3)
    merged = merge_towers(first, second)
    for ours, one, two in zip(merged, first, second, strict=True):
        expected = bilinear(two.unflatten(0, (other, other)), 4).flatten(0, 1)
        torch.testing.assert_close(ours, torch.cat([one, expected], dim=-1))


@pytest.mark.parametrize("layers", [3, -4, [0, 9]])
def test_a_layer_that_the_encoder_lacks_is_refused(layers: int | list[int]) -> None:
    config = CLIPVisionConfig(**ENCODERS["clip_vision_model"][0])
    with pytest.raises(ValueError, match="has the 3 layers 0 to 2"):
        VisionTower(config, layers, "patch")
