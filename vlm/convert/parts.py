"""Models that come in parts: a vision tower, a language model and what joins them, each in files of its own."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm.convert.sources import read_settings, read_tokenizer, refuse_quantised
from vlm.convert.tensors import (
    INDEX,
    SINGLE,
    Joined,
    PickledTensors,
    Renamed,
    SafetensorsFiles,
    Shape,
    Tensors,
    index_files,
    weight_files,
)
from vlm.errors import UserError, first_line
from vlm.hub import PICKLES, SETTINGS, WEIGHTS, fetch

# settings of peft that make more of a LoRA than two factors for each layer
UNUSUAL = "use_dora rank_pattern alpha_pattern modules_to_save fan_in_fan_out bias lora_bias layer_replication".split()
PICKLED = "pytorch_model.bin"
# what a CLIP or SigLIP holds beside its vision tower
TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class Part:
    """A part's configuration and its tensors under our names."""

    folder: Path
    config: PreTrainedConfig
    tensors: Tensors


def read_tower(name: str) -> Part:
    """The vision tower of a folder or hub id: an encoder, or the one in a whole CLIP or SigLIP."""
    folder = _fetch(name)
    written = read_settings(folder / "config.json")
    if isinstance(written.get("vision_config"), dict):
        kind = f"{written.get('model_type')}_vision_model"
        written = {"model_type": kind, **written["vision_config"]}
    config = make_config(written, str(folder))
    held = any_weights(folder)
    names = {
        f"vision_tower.encoder.{own.removeprefix('vision_model.')}": own
        for own in held.shapes
        if not own.startswith(TEXT_SIDE)
    }
    return Part(folder, config, Renamed(held, names))


def read_language_model(name: str) -> Part:
    """The causal LM of a folder or hub id."""
    folder = _fetch(name)
    config = make_config(read_settings(folder / "config.json"), str(folder))
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name}: a {config.model_type!r} model, where a causal language model is needed")
    held = any_weights(folder)
    return Part(folder, config, Renamed(held, {f"language_model.{own}": own for own in held.shapes}))


def _fetch(name: str) -> Path:
    """The folder of a part: pickles are asked for only where there are no safetensors, since many hold both."""
    folder = fetch(name, *SETTINGS, *WEIGHTS)
    return folder if _has_safetensors(folder) else fetch(name, *SETTINGS, *PICKLES)


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def make_config(written: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """transformers' configuration of these settings. UserError for a kind that the installed version doesn't know, and
    for quantised weights (those that a LoRA was trained over don't matter: its base is read in full)."""
    refuse_quantised(written, where)
    kind = written.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{where}: a model of the unknown kind {kind!r}")
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(dict(written))
    except Exception as error:  # transformers fails in many ways on broken configurations
        raise UserError(f"{where}: its config.json can't be read ({first_line(error)})") from error
    return config


def any_weights(folder: Path) -> Tensors:
    """A folder's weights: safetensors, or else pickles that hold nothing but tensors."""
    if _has_safetensors(folder):
        return SafetensorsFiles(weight_files(folder))
    if (folder / f"{PICKLED}.index.json").is_file():
        return Joined([PickledTensors(path) for path in index_files(folder, f"{PICKLED}.index.json")])
    if (folder / PICKLED).is_file():
        return PickledTensors(folder / PICKLED)
    raise UserError(f"{folder}: no weights in it ({SINGLE} or {PICKLED})")


class Grown:
    """A source with more rows in some of its tensors, those of tokens that were added: each is the mean of the rest.

    The LM never reads the image token's embedding, and with a mean row in the head it is never the likeliest.
    """

    def __init__(self, source: Tensors, names: Collection[str], rows: int) -> None:
        self._source = source
        self.grown = [name for name in names if name in source.shapes and source.shapes[name][0] < rows]
        self._rows = rows
        grown = {name: (rows, *source.shapes[name][1:]) for name in self.grown}
        self.shapes: dict[str, Shape] = {**source.shapes, **grown}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        if name not in self.grown:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(self._rows - len(tensor), *mean.shape[1:])])


class Cut:
    """A source without the last rows of one tensor, where it has more than `rows`: padding of a vocabulary."""

    def __init__(self, source: Tensors, name: str, rows: int) -> None:
        self._source, self._name, self._rows = source, name, rows
        self.shapes: dict[str, Shape] = dict(source.shapes)
        if name in self.shapes:
            self.shapes[name] = (min(rows, self.shapes[name][0]), *self.shapes[name][1:])

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        return tensor[: self._rows] if name == self._name else tensor


class WithLora:
    """A source with LoRA (Hu et al. 2021) added to its weights in float32 as they are read."""

    def __init__(self, source: Tensors, lora: Tensors, scaling: float, where: str) -> None:
        self._source, self._lora, self._scaling = source, lora, scaling
        self.shapes: Mapping[str, Shape] = source.shapes
        self._pairs: dict[str, tuple[str, str]] = {}
        left = set(lora.shapes)
        for name in lora.shapes:
            module, mark, _ = name.rpartition(".lora_A.weight")
            other = f"{module}.lora_B.weight"
            if not mark or other not in lora.shapes:
                continue
            target = f"{module}.weight"
            (rank, width), (height, _) = lora.shapes[name], lora.shapes[other]
            if source.shapes.get(target) != (height, width) or lora.shapes[other][1] != rank:
                raise UserError(f"{where}: its {name} fits no {target} of the base model")
            self._pairs[target] = (name, other)
            left -= {name, other}
        if left or not self._pairs:
            what = f"{len(left)} tensors that are no LoRA of a layer, the first is {min(left)}" if left else "no LoRA"
            raise UserError(f"{where}: holds {what}")

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        if name not in self._pairs:
            return tensor
        down, up = (self._lora.read(half).float() for half in self._pairs[name])
        return (tensor.float() + self._scaling * up @ down).to(tensor.dtype)


def unusual(adapter: Path) -> str | None:
    """What makes an adapter another thing than LoRA with one rank and scaling for all layers; None for that."""
    settings = read_settings(adapter / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        return str(settings.get("peft_type"))
    return next((name for name in UNUSUAL if settings.get(name) not in (None, False, "none", {}, [])), None)


def read_lora(adapter: Path, name_of: Callable[[str], str]) -> tuple[Tensors, float]:
    """The tensors of a peft folder under the names that `name_of` gives them, and what they are multiplied by."""
    if (what := unusual(adapter)) is not None:
        raise UserError(f"{adapter}: an adapter of another kind than plain LoRA ({what})")
    settings = read_settings(adapter / "adapter_config.json")
    safe, pickled = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    held: Tensors = SafetensorsFiles([safe]) if safe.is_file() else PickledTensors(pickled)
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    scaling = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return Renamed(held, {name_of(name): name for name in held.shapes}), scaling


def read_tokenizer_of(language_model: PreTrainedConfig, *folders: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the first folder that has one."""
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
            return read_tokenizer(folder, language_model)
    raise UserError(f"{folders[0]}: no tokenizer in it")


def read_generation(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
