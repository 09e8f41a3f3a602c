"""The tokenizer and preprocessing files of a LLaVA folder, as transformers 4.x and 5.x and vLLM read them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoProcessor

from vlm.checkpoint import pin_tokenizer
from vlm.configuration import VisionLanguageConfig
from vlm.convert import llava
from vlm.convert.parity import Probe
from vlm.errors import UserError
from vlm.processing import VisionLanguageProcessor

PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
PIXEL_TOLERANCE = 1e-4


def write_processor(processor: VisionLanguageProcessor, config: VisionLanguageConfig, folder: Path) -> None:
    """tokenizer, preprocessor_config.json, processor_config.json, chat_template.jinja and .json."""
    written = llava.write_config(config)
    kind = PROCESSORS[written["model_type"]]
    vision: Any = config.vision_config
    processor.tokenizer.save_pretrained(folder)
    pin_tokenizer(folder, processor_class=kind)
    images = processor.image_processor.to_dict()
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    images["processor_class"] = kind
    if written["model_type"] == "llava_next":
        # a view is a square of the encoder's size: any rule of resizing keeps it, and LLaVA-NeXT knows but this one
        edge = config.image_tokens.view_size
        images |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": written["image_grid_pinpoints"],
            "size": {"shortest_edge": edge},
            "crop_size": {"height": edge, "width": edge},
            "do_center_crop": bool(images.get("do_center_crop")),
            "do_pad": True,
        }
    settings = {
        "processor_class": kind,
        "image_token": processor.image_token,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": written["vision_feature_select_strategy"],
        "num_additional_image_tokens": llava.leading_tokens(vision),
    }
    template = processor.chat_template
    _write(folder / "preprocessor_config.json", images)
    _write(folder / "processor_config.json", settings)
    _write(folder / "chat_template.json", {"chat_template": template})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def llava_pixels(config: VisionLanguageConfig, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What our processor makes of images in the form that transformers' LLaVA takes."""
    tokens = config.image_tokens
    if tokens.mode == "none":
        return {"pixel_values": pixels["pixel_values"]}
    sizes = pixels["image_sizes"]
    views = pixels["pixel_values"].split([tokens.views(height, width) for height, width in sizes.tolist()])
    padded = torch.nn.utils.rnn.pad_sequence(list(views), batch_first=True)  # [I, most views, 3, H, W]
    return {"pixel_values": padded, "image_sizes": sizes}


def check_processor(folder: Path, ours: VisionLanguageProcessor, config: VisionLanguageConfig, probe: Probe) -> None:
    """UserError unless transformers' own processor makes of a chat with images what ours makes of it."""
    theirs = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    # beside torchvision, images would be scaled by its kernels, which round in another way than Pillow's
    theirs.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    content = [{"type": "image"} for _ in probe.images] + [{"type": "text", "text": "What do you see?"}]
    chat = [{"role": "user", "content": content}]
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True)
    made = theirs(images=list(probe.images), text=rendered, add_special_tokens=False, return_tensors="pt")
    own = ours.chat.encode(chat, ours.placeholders(probe.images), add_generation_prompt=True).input_ids
    if made["input_ids"][0].tolist() != own:
        raise UserError(
            "transformers' processor makes other tokens of a chat with images than ours "
            f"({made['input_ids'].shape[1]} and {len(own)}); nothing was kept"
        )
    expected = llava_pixels(config, probe.pixels)["pixel_values"]
    if made["pixel_values"].shape != expected.shape:
        raise UserError(
            f"transformers' processor makes images of {list(made['pixel_values'].shape)}, ours of "
            f"{list(expected.shape)}; nothing was kept"
        )
    if not (worst := float((made["pixel_values"] - expected).abs().max())) <= PIXEL_TOLERANCE:
        raise UserError(f"transformers' processor prepares images differently (by up to {worst:.2g}); nothing was kept")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
