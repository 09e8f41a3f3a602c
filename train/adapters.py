"""What happens to the linear layers of the language model that a recipe names: LoRA through peft, or a fresh start."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train.recipe import Lora
from vlm.checkpoint import written_aside
from vlm.errors import UserError
from vlm.modeling import VisionLanguageModel, decoder_layers

if TYPE_CHECKING:  # importing peft takes a second or two, more with bitsandbytes
    from peft import PeftModel


def target_modules(model: VisionLanguageModel, targets: tuple[str, ...], setting: str = "lora.targets") -> list[str]:
    """Full names of the linear layers in the LM's decoder layers: all, or those whose last name is in `targets`.

    UserError, which names the `setting`, when no layer has one of these names.
    """
    layers = {id(module) for module in decoder_layers(model.language_model).modules()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in layers]
    known = {name.rsplit(".", 1)[-1] for name in linear}
    if unknown := sorted(set(targets) - known):
        there = ", ".join(sorted(known))
        raise UserError(f"{setting}: the language model has no {', '.join(unknown)}; there are {there}")
    return [name for name in linear if not targets or name.rsplit(".", 1)[-1] in targets]


@torch.no_grad()
def draw_anew(model: VisionLanguageModel, targets: tuple[str, ...]) -> None:
    """New random weights for these layers, from the deviation that the LM's own configuration names."""
    text_config: Any = model.config.text_config
    for name in target_modules(model, targets, "reset"):
        layer: Any = model.get_submodule(name)
        nn.init.normal_(layer.weight, std=text_config.initializer_range)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def add_lora(model: VisionLanguageModel, lora: Lora) -> "PeftModel":
    """Puts adapters into `model` in place. The returned handle saves and merges them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.targets),
    )
    return get_peft_model(model, config)


def save_adapter(adapter: "PeftModel", folder: Path, base: str) -> None:
    """A peft folder that names its base model: a folder by its whole path, so that it is found from anywhere."""
    known = str(Path(base).resolve()) if Path(base).is_dir() else base
    adapter.peft_config["default"].base_model_name_or_path = known
    with written_aside(folder) as partial:
        adapter.save_pretrained(str(partial))


def merged(adapter: "PeftModel") -> Any:
    """The model with the adapters folded into its weights."""
    return adapter.merge_and_unload()
