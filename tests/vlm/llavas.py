"""Tiny random LLaVA folders as several versions of transformers write them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

SIZE, PATCH = 32, 8
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_factor": 4.0,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 330,  # more than the tokenizer has: padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 512,
}
# prefixes as transformers 5.19 writes them -> as others do; "4.x" is what 4.40 to 4.57 write
LAYOUTS = {
    "5.19": {},
    "4.x": {"vision_tower.": "vision_tower.vision_model."},
    "in memory": {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "image_newline": "model.image_newline",
    },
    "in memory, wrapped": {
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "image_newline": "model.image_newline",
    },
}


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]  # (height, width)


def make_llava(
    folder: Path, tokenizer: Any, vision: Any = None, text: Any = None, anyres: bool = False, **settings: Any
) -> Path:
    """A folder as the installed transformers writes it; anyres: a LLaVA-NeXT."""
    kind, config_kind = LlavaForConditionalGeneration, LlavaConfig
    if anyres:
        kind, config_kind = LlavaNextForConditionalGeneration, LlavaNextConfig
        settings["image_grid_pinpoints"] = PINPOINTS
    config = config_kind(
        vision_config={**VISION, **(vision or {})},
        text_config={
            **TEXT,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            **(text or {}),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2,
        **settings,
    )
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    images = {
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.4, 0.5, 0.6],
    }
    (LlavaNextProcessor if anyres else LlavaProcessor)(
        LlavaNextImageProcessorPil(**images, image_grid_pinpoints=PINPOINTS)
        if anyres
        else CLIPImageProcessorPil(**images),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if "siglip" in config.vision_config.model_type else 1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


def relayout(folder: Path, layout: str) -> None:
    """Renames a folder's tensors; 4.x also keeps its settings elsewhere."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old, new = next(((o, n) for o, n in LAYOUTS[layout].items() if name.startswith(o)), ("", ""))
        tensors[new + name.removeprefix(old)] = tensor
    if layout == "4.x":
        positions = torch.arange((SIZE // PATCH) ** 2 + 1)[None]
        tensors["vision_tower.vision_model.embeddings.position_ids"] = positions  # a buffer that 4.30 saved
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if layout != "4.x":
        return
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    config["text_config"].pop("tie_word_embeddings", None)
    write(folder / "config.json", config)
    processor = json.loads((folder / "processor_config.json").read_text())
    write(folder / "preprocessor_config.json", processor.pop("image_processor"))
    write(folder / "processor_config.json", processor)
    write(folder / "chat_template.json", {"chat_template": (folder / "chat_template.jinja").read_text()})
    (folder / "chat_template.jinja").unlink()


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, **changes: Any) -> None:
    write(path, {**json.loads(path.read_text()), **changes})
