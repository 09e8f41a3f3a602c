"""Tiles: LLaVA-NeXT's own numbers, pixels and logits, and the plain mode against views that are encoded one by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image

from tests.vlm.chats import picture, user
from tests.vlm.conftest import LoadedModels
from tests.vlm.test_llava_parity import llava_weights
from vlm import UserError, VisionLanguageConfig, VisionLanguageModel, VisionLanguageProcessor, load, save
from vlm.processing import make_processor
from vlm.tiling import ImageTokens

EDGE, PATCH, SIDE = 32, 8, 4
PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96), (160, 32))
# (height, width): square, odd rests above and below and beside, the pinpoints' own, and thinner than a row of patches
SIZES = [
    (32, 32), (64, 64), (32, 64), (64, 32), (33, 47), (47, 33), (31, 97), (97, 31), (50, 50), (100, 64), (64, 100),
    (13, 60), (60, 13), (200, 90), (90, 200), (480, 640), (640, 480), (1, 1), (1, 400), (400, 1), (2, 333), (333, 2),
    (7, 96), (96, 7),
]  # fmt: skip


def counter(**settings: Any) -> ImageTokens:
    return ImageTokens(
        **{"per_view": SIDE**2, "side": SIDE, "view_size": EDGE, "mode": "anyres", "pinpoints": PINPOINTS, **settings}
    )


def build(
    loaded_models: LoadedModels, connector: str = "mlp", fusion: str = "early", **changes: Any
) -> tuple[VisionLanguageModel, VisionLanguageProcessor]:
    base, processor = loaded_models(fusion, connector)
    tiling = {"mode": "anyres", "pinpoints": [list(pinpoint) for pinpoint in PINPOINTS]}
    config = VisionLanguageConfig(**{**base.config.to_diff_dict(), "tiling": tiling, **changes})
    torch.manual_seed(0)
    model = VisionLanguageModel(config).eval()
    for block in model.cross_attention.values():
        torch.nn.init.constant_(block.attn_gate, 0.5)
    return model, make_processor(config, processor.tokenizer)


def as_llava_next(model: VisionLanguageModel) -> LlavaNextForConditionalGeneration:
    config = model.config
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            image_grid_pinpoints=config.tiling["pinpoints"],
            vision_feature_layer=config.vision_feature_layer,
        )
    )
    theirs.load_state_dict(llava_weights(model), strict=True)
    return theirs.eval()


def llava_next_processor(processor: VisionLanguageProcessor) -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE},
        crop_size={"height": EDGE, "width": EDGE},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
    )
    return LlavaNextProcessor(images, processor.tokenizer, PATCH, "default", num_additional_image_tokens=1)


def show(sizes: list[tuple[int, int]]) -> tuple[list[Any], list[str]]:
    """A picture of each size, and a prompt of its own length for each."""
    pictures = [picture(seed, width, height) for seed, (height, width) in enumerate(sizes)]
    return pictures, [f"<|user|><image>what is{' this' * (seed % 3)}?<|assistant|>" for seed in range(len(sizes))]


@pytest.mark.parametrize("first", range(0, len(SIZES), 8))
def test_ids_pixels_logits_and_answers_equal_transformers_llava_next(loaded_models: LoadedModels, first: int) -> None:
    model, processor = build(loaded_models)
    theirs, their_processor = as_llava_next(model), llava_next_processor(processor)
    pictures, text = show(SIZES[first : first + 8])
    ours = processor(images=pictures, text=text, padding=True)
    other = their_processor(images=pictures, text=text, padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], other["input_ids"])
    assert ours["image_sizes"].tolist() == other["image_sizes"].tolist()
    counts = [image_size_to_num_patches(size, [list(p) for p in PINPOINTS], EDGE) for size in other["image_sizes"]]
    views = [views[:count] for views, count in zip(other["pixel_values"], counts, strict=True)]
    assert torch.equal(ours["pixel_values"], torch.cat(views))
    with torch.no_grad():
        real = ours["attention_mask"].bool()
        torch.testing.assert_close(model(**ours).logits[real], theirs(**other).logits[real], rtol=0, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**ours, **options), theirs.generate(**other, **options))
    assert model.encode_images(ours["pixel_values"], ours["image_sizes"]).tiles == tuple(counts)


def test_several_images_of_different_sizes_in_one_prompt_equal_transformers_llava_next(
    loaded_models: LoadedModels,
) -> None:
    model, processor = build(loaded_models)
    theirs, their_processor = as_llava_next(model), llava_next_processor(processor)
    pictures, _ = show(SIZES[3:8])
    text = ["a <image> b <image><image> c", "nothing", "<image> d <image>"]
    ours = processor(images=[pictures[:3], [], pictures[3:]], text=text, padding=True)
    other = their_processor(images=pictures, text=text, padding=True, return_tensors="pt")
    real = ours["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**ours).logits[real], theirs(**other).logits[real], rtol=0, atol=1e-5)


LENGTHS = st.integers(1, 2000)


@given(height=LENGTHS, width=LENGTHS, side=st.integers(1, 27), size=st.integers(2, 40))
@example(height=1, width=2000, side=24, size=336)
@example(height=2000, width=1, side=27, size=384)
@settings(max_examples=300, deadline=None)
def test_tokens_are_counted_as_llava_next_unpads_images_of_any_size(
    height: int, width: int, side: int, size: int
) -> None:
    pinpoints = tuple((rows * size, columns * size) for rows in range(1, 4) for columns in range(1, 4))
    tokens = counter(per_view=side**2, side=side, view_size=size, pinpoints=pinpoints)
    rows, columns = tokens.grid(height, width)
    grid = torch.empty(1, rows * side, columns * side)
    left = unpad_image(grid, (height, width)).shape
    assert tokens.visual(height, width) == side**2 + left[1] * (left[2] + 1)
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    kept, newlines = processor._get_unpadded_features(height, width, side, side, rows, columns)
    assert tokens.visual(height, width) == side**2 + kept + newlines
    assert tokens.views(height, width) == image_size_to_num_patches((height, width), [list(p) for p in pinpoints], size)


def test_of_an_image_that_is_thinner_than_a_row_only_the_whole_view_is_left() -> None:
    assert counter(side=4, pinpoints=((64, 64),)).visual(1, 400) == 16
    assert counter(side=3, per_view=9, pinpoints=((96, 32),)).visual(1, 400) == 9 + 1 * 4  # the middle of nine rows


@pytest.mark.parametrize("connector", ["mlp", "perceiver"])
@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_plain_tiles_are_views_one_after_another(loaded_models: LoadedModels, fusion: str, connector: str) -> None:
    model, processor = build(loaded_models, connector, fusion, tiling={"mode": "tiles", "pinpoints": PINPOINTS})
    sizes = [(32, 64), (50, 50), (90, 200)]
    pictures, _ = show(sizes)
    pixels = processor.pixels(pictures)
    with torch.no_grad():
        visual = model.encode_images(pixels["pixel_values"], pixels["image_sizes"])
        views = model.multi_modal_projector(model.vision_tower(pixels["pixel_values"]))
    assert torch.equal(visual.tokens, views.flatten(0, 1))
    assert visual.tiles == tuple(1 + tiles for tiles in (2, 4, 3))
    assert visual.lengths == tuple(tiles * views.shape[1] for tiles in visual.tiles)
    each = processor.placeholders(pictures)
    assert each == ([1, 1, 1] if fusion == "deep" else list(visual.lengths))
    prompts = [user(None, "what?", None), user(None, "and?")]
    ids = [processor.chat.encode(prompts[0], each[:2]).input_ids, processor.chat.encode(prompts[1], each[2:]).input_ids]
    width = max(map(len, ids))
    padded = torch.tensor([[processor.tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **pixels, **options)[:, width:]
    for row, shown in zip(range(2), (pictures[:2], pictures[2:]), strict=True):
        alone = model.generate(torch.tensor([ids[row]]), **processor.pixels(shown), **options)
        assert alone[0, len(ids[row]) :].tolist() == together[row].tolist()
    beams = model.generate(padded, attention_mask=mask, **pixels, **options, num_beams=2)
    assert beams.shape == (2, width + 6)


def test_a_tile_shows_its_part_of_the_picture(loaded_models: LoadedModels) -> None:
    _, processor = build(loaded_models, tiling={"mode": "tiles", "pinpoints": ((64, 64),)})
    quarters = np.zeros((64, 64, 3), dtype=np.uint8)
    quarters[:32, 32:], quarters[32:, :32], quarters[32:, 32:] = 80, 160, 240
    views = processor.image_tokens.cut(Image.fromarray(quarters))
    assert [view.size for view in views] == [(32, 32)] * 5
    assert [view.getextrema()[0] for view in views[1:]] == [(0, 0), (80, 80), (160, 160), (240, 240)]


def test_a_picture_of_a_million_columns_is_cut_as_its_size_says() -> None:
    row = np.arange(1_000_000, dtype=np.float32) / 4000
    ramp = Image.fromarray(np.repeat(row[None, :, None], 3, axis=2).astype(np.uint8))
    tokens = counter()
    views = tokens.cut(ramp)
    assert len(views) == tokens.views(ramp.height, ramp.width) == 3
    assert [view.size for view in views] == [(32, 32)] * 3
    middle = np.concatenate([np.asarray(view)[15:17, :, 0].max(0) for view in views[1:]])
    np.testing.assert_allclose(middle, np.linspace(0, 250, 64), atol=4)


def test_a_pooled_grid_is_put_together_from_its_squares(loaded_models: LoadedModels) -> None:
    model, processor = build(loaded_models, connector="mlp")
    shared = model.config.to_diff_dict()
    pooled = VisionLanguageModel(VisionLanguageConfig(**{**shared, "connector": {"type": "mlp", "pool": 2}})).eval()
    assert (pooled.config.image_tokens.side, pooled.config.image_tokens.per_view) == (2, 4)
    pictures, _ = show([(32, 64)])
    pixels = processor.pixels(pictures)
    with torch.no_grad():
        visual = pooled.encode_images(pixels["pixel_values"], pixels["image_sizes"])
        views = pooled.multi_modal_projector(pooled.vision_tower(pixels["pixel_values"]))  # [3, 4, D]
    end = pooled.image_newline[None]
    rows = [torch.cat([views[1, 2 * row : 2 * row + 2], views[2, 2 * row : 2 * row + 2], end]) for row in range(2)]
    assert torch.equal(visual.tokens, torch.cat([views[0], *rows]))


def test_views_and_sizes_that_dont_match_are_refused_with_both_counts(loaded_models: LoadedModels) -> None:
    model, processor = build(loaded_models)
    pixels = processor.pixels([picture(1, 64, 32)])
    with pytest.raises(ValueError, match="2 views, but 1 images of these sizes need 3"):
        model.encode_images(pixels["pixel_values"][:2], pixels["image_sizes"])
    with pytest.raises(ValueError, match="need their sizes"):
        model.encode_images(pixels["pixel_values"])
    with pytest.raises(ValueError, match="the text has 2 <image> marks for 1 images"):
        processor(images=[picture(1)], text="<image> and <image>")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tiling": {"mode": "anyres", "pinpoints": [[32, 40]]}}, "32 x 40 can't be cut into tiles of 32 pixels"),
        ({"tiling": {"mode": "anyress"}}, "tiling: mode"),
        ({"connector": {"type": "perceiver"}}, "anyres .* needs an mlp connector"),
        ({"vision_feature_select": "cls_patch"}, "anyres .* needs an mlp connector"),
    ],
)
def test_tilings_that_can_not_be_are_refused(
    loaded_models: LoadedModels, changes: dict[str, Any], complaint: str
) -> None:
    model, _ = build(loaded_models)
    with pytest.raises(ValueError, match=complaint):
        VisionLanguageConfig(**{**model.config.to_diff_dict(), **changes})


def test_a_saved_folder_remembers_its_tiles(loaded_models: LoadedModels, tmp_path: Path) -> None:
    model, processor = build(loaded_models)
    save(model, processor, tmp_path / "model")
    again, processor_again = load(tmp_path / "model")
    assert processor_again.image_tokens == processor.image_tokens == again.config.image_tokens
    assert torch.equal(again.image_newline, model.image_newline)
    pictures, text = show(SIZES[4:6])
    assert torch.equal(
        processor_again(images=pictures, text=text, padding=True)["input_ids"],
        processor(images=pictures, text=text, padding=True)["input_ids"],
    )
    settings = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    settings["image_tokens"]["pinpoints"] = [[64, 64]]
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"processor_config\.json counts image tokens for another model"):
        load(tmp_path / "model")


def test_a_new_newline_is_drawn_as_llava_next_draws_it(loaded_models: LoadedModels) -> None:
    model, _ = build(loaded_models)
    assert model.image_newline.std().item() == pytest.approx(model.image_newline.shape[0] ** -0.5, rel=0.3)
    again, _ = build(loaded_models)
    assert torch.equal(model.image_newline, again.image_newline)


def test_default_pinpoints_are_llava_nexts() -> None:
    config = VisionLanguageConfig(vision_config={"image_size": 336, "patch_size": 14}, tiling={"mode": "anyres"})
    assert config.tiling["pinpoints"] == LlavaNextImageProcessorPil.image_grid_pinpoints
    assert VisionLanguageConfig.from_dict(config.to_dict()).image_tokens == config.image_tokens
