"""Folders of the original LLaVA: whole models, projectors alone, and LoRA checkpoints.

What they hold is read off llava/model/llava_arch.py, llava/model/builder.py and llava/train/train.py of LLaVA 1.2.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.convert.images import NEEDS_PADDING, image_processor, read_image_settings
from vlm.convert.imported import NO_TEMPLATE, Imported, check_vocabulary
from vlm.convert.keys import match, skeleton
from vlm.convert.llava import build_config
from vlm.convert.parts import (
    Grown,
    Part,
    WithLora,
    any_weights,
    make_config,
    read_generation,
    read_language_model,
    read_lora,
    read_tokenizer_of,
    read_tower,
)
from vlm.convert.sources import read_chat_template
from vlm.convert.tensors import Floats, Joined, PickledTensors, Renamed, Tensors
from vlm.errors import UserError
from vlm.templates import VICUNA_V1, fit_template
from vlm.tokenization import IMAGE_TOKEN, add_image_token, fill_padding_token

# model_type of their config.json -> the language model's
LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
TOP_LEVEL_ONLY = re.compile(r"(mm|tune|freeze|unfreeze|image|tokenizer|use_mm)_|(architectures|auto_map|torch_dtype)$")
PROJECTOR = "mm_projector"
FEATURES = ("patch", "cls_patch")
UNREAD = "mm_use_im_start_end s2 mm_resampler_type mm_spatial_pool_mode mm_spatial_pool_stride".split()
# image_aspect_ratio: others tile or scale in ways of their own (anyres_max_9, highres)
ASPECTS = (None, "square", "pad", "anyres")


def is_original(written: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original LLaVA's: one flat mapping of the LM's settings and mm_..."""
    return (
        written.get("model_type") in LANGUAGE_MODELS and "vision_config" not in written and "mm_vision_tower" in written
    )


def read_original(
    folder: Path, written: dict[str, Any], base: str | None, vision_tower: str | None, chat_template: Path | None
) -> Imported:
    """A whole model, or with `base` a projector alone or a LoRA. `vision_tower` replaces what config.json names."""
    where = str(folder)
    _refuse_unknown(written, where)
    layer = written.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise UserError(f"{where}: mm_vision_select_layer {layer!r} in its config.json is no number of a layer")
    tower = read_tower(vision_tower or str(written["mm_vision_tower"]))
    text, own, notes = _read_language_side(folder, written, base)
    tokenizer = read_tokenizer_of(text.config, folder, text.folder)
    fill_padding_token(tokenizer)
    image_token_id = add_image_token(tokenizer)
    text_config: Any = text.config
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    config = build_config(
        where,
        vision_config=tower.config.to_dict(),
        text_config=text_config.to_dict(),
        connector=_connector(str(written.get("mm_projector_type", "linear")), where),
        tiling=_tiling(written, tower.config, where),
        vision_feature_layer=layer,
        vision_feature_select=written.get("mm_vision_select_feature", "patch"),
        image_token_id=image_token_id,
        dtype=written.get("torch_dtype") or written.get("dtype"),
    )
    check_vocabulary(tokenizer, config, where)
    frame = skeleton(config)
    embeddings = [f"language_model.{frame.base}.embed_tokens.weight", f"language_model.{frame.head}.weight"]
    joined = Grown(Joined([tower.tensors, own]), embeddings, text_config.vocab_size)
    if joined.grown:
        notes.append(
            f"{IMAGE_TOKEN} was added as token {image_token_id}; its row is the mean of the others, and never read"
        )
    used = match(joined, {name: name for name in joined.shapes}, frame, where)
    template = read_chat_template(folder, tokenizer, chat_template, IMAGE_TOKEN)
    if template is None:
        if text_config.model_type != "llama":
            raise UserError(NO_TEMPLATE.format(folder=folder))
        template = fit_template(VICUNA_V1, tokenizer, IMAGE_TOKEN)
        notes.append(
            "no chat template in it: vicuna_v1 is used with its system sentence, as LLaVA 1.5 was trained and "
            "evaluated with it (--chat-template FILE)"
        )
    images = read_image_settings(tower.folder)
    if written.get("image_aspect_ratio") == "pad":
        images = {**images, "image_processor_type": NEEDS_PADDING, "do_pad": True}
        notes.append(
            "images are padded to squares with the mean colour before they are scaled, as image_aspect_ratio says"
        )
    return Imported(
        config,
        Floats(joined, used, where),
        tokenizer,
        IMAGE_TOKEN,
        template,
        image_processor(images, str(tower.folder)),
        read_generation(folder) or read_generation(text.folder),
        notes,
    )


def from_original(name: str) -> str:
    """Our name of a tensor. Checkpoints of adapters put base_model.model. before it."""
    name = name.removeprefix("base_model.model.")
    if (found := re.fullmatch(r"(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)", name)) is not None:
        return f"multi_modal_projector.layers.{found[1] or 0}.{found[2]}"
    if name.removeprefix("model.") == "image_newline":
        return "image_newline"
    if name.startswith("model.vision_tower."):
        encoder = name.removeprefix("model.vision_tower.").removeprefix("vision_tower.").removeprefix("vision_model.")
        return f"vision_tower.encoder.{encoder}"
    return f"language_model.{name}"


def _read_language_side(folder: Path, written: dict[str, Any], base: str | None) -> tuple[Part, Tensors, list[str]]:
    """The LM, all tensors but the tower's, and what people should know."""
    projector, extra = folder / f"{PROJECTOR}.bin", folder / "non_lora_trainables.bin"
    if (folder / "adapter_config.json").is_file():
        settings_base = base or _adapter_base(folder)
        text = read_language_model(settings_base)
        lora, scaling = read_lora(folder, lambda name: from_original(name))
        merged: Tensors = WithLora(text.tensors, lora, scaling, str(folder))
        trained = _renamed(PickledTensors(extra))
        return text, Joined([merged, trained]), [f"the adapter was merged into {settings_base}"]
    if projector.is_file() and not _has_weights(folder):
        if base is None:
            raise UserError(f"{folder}: only a projector; name its language model with --base")
        text = read_language_model(base)
        return text, Joined([text.tensors, _renamed(PickledTensors(projector))]), []
    if base is not None:
        raise UserError(f"{folder}: holds its own language model; leave out --base")
    settings = {name: value for name, value in written.items() if not TOP_LEVEL_ONLY.match(name)}
    config = make_config({**settings, "model_type": LANGUAGE_MODELS[str(written["model_type"])]}, str(folder))
    held = _renamed(any_weights(folder))
    return Part(folder, config, held), held, []


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _adapter_base(folder: Path) -> str:
    from vlm.convert.sources import read_settings

    base = read_settings(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}: an adapter that doesn't name its language model; give it with --base")
    return str(base)


def _renamed(source: Tensors) -> Tensors:
    return Renamed(source, {from_original(name): name for name in source.shapes})


def _refuse_unknown(written: Mapping[str, Any], where: str) -> None:
    for name in UNREAD:
        if written.get(name):
            raise UserError(f"{where}: {name} {written[name]!r} in its config.json is not supported")
    if (kept := written.get("mm_vision_select_feature", "patch")) not in FEATURES:
        raise UserError(
            f"{where}: mm_vision_select_feature {kept!r} in its config.json is not supported; "
            f"{' and '.join(FEATURES)} are"
        )
    if (aspect := written.get("image_aspect_ratio")) not in ASPECTS:
        known = ", ".join(str(name) for name in ASPECTS[1:])
        raise UserError(f"{where}: image_aspect_ratio {aspect!r} in its config.json is not supported; {known} are")


def _connector(kind: str, where: str) -> dict[str, Any]:
    if kind == "linear":
        return {"type": "mlp", "depth": 1}
    if (found := re.fullmatch(r"mlp(\d+)x_gelu", kind)) is None:
        raise UserError(f"{where}: mm_projector_type {kind!r} is not supported; linear and mlpNx_gelu are")
    return {"type": "mlp", "depth": int(found[1]), "activation": "gelu"}


def _tiling(written: Mapping[str, Any], vision: Any, where: str) -> dict[str, Any] | None:
    if written.get("image_aspect_ratio") != "anyres":
        return None
    merge = written.get("mm_patch_merge_type", "flat")
    modes = {"spatial_unpad": "anyres", "flat": "tiles"}
    if merge not in modes:
        raise UserError(f"{where}: mm_patch_merge_type {merge!r} is not supported; {' and '.join(modes)} are")
    return {"mode": modes[merge], "pinpoints": _pinpoints(written.get("image_grid_pinpoints"), vision, where)}


def _pinpoints(given: Any, vision: Any, where: str) -> list[list[int]]:
    """Theirs are (width, height) in pixels, also as text, or of views from the first to the last: "(1x1),...,(6x6)"."""
    try:
        if isinstance(given, str) and (views := re.findall(r"\((\d+)x(\d+)\)", given)):
            (width, height), (most_width, most_height) = (map(int, views[place]) for place in (0, -1))
            edge = vision.image_size
            return [
                [high * edge, wide * edge]
                for wide in range(width, most_width + 1)
                for high in range(height, most_height + 1)
            ]
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return [[int(height), int(width)] for width, height in pairs]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise UserError(
            f"{where}: image_grid_pinpoints {given!r} in its config.json is no list of [width, height], which "
            "image_aspect_ratio anyres needs"
        ) from None
