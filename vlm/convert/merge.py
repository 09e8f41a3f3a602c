"""The model that is exported: a folder of ours or an adapter over one, also over a quantised one."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.checkpoint import ADAPTER_CONFIG, attach_adapter, check_source, fold, load, read_object
from vlm.configuration import VisionLanguageConfig, context_length
from vlm.convert.keys import file_tensors
from vlm.convert.parity import Probe, logits, make_probe, release
from vlm.convert.parts import WithLora, read_lora, unusual
from vlm.convert.tensors import InMemory, SafetensorsFiles, Tensors, weight_files
from vlm.errors import UserError, first_line
from vlm.hub import fetch
from vlm.modeling import VisionLanguageModel
from vlm.processing import VisionLanguageProcessor


@dataclass(frozen=True)
class Source:
    """name: as it was given; folder: of the model; adapter: of a LoRA that belongs to it."""

    name: str
    folder: Path
    adapter: Path | None
    config: VisionLanguageConfig

    @property
    def quantised(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32


@dataclass(frozen=True)
class Reading:
    """A model that was asked: what it was asked, the logits that it gave, and those without its adapter, if any."""

    processor: VisionLanguageProcessor
    probe: Probe
    expected: list[torch.Tensor]
    base: list[torch.Tensor] | None = None


def open_source(name: str) -> Source:
    """UserError for what is neither a model of ours nor an adapter over one."""
    folder, adapter = fetch(name), None
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base:
            raise UserError(f"{name}: an adapter that doesn't name its base model")
        folder, adapter = fetch(str(base)), folder
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"{name}: its base {folder} is an adapter, too; merge that one first")
    check_source(folder, model_type="vlm")
    try:
        config = VisionLanguageConfig.from_pretrained(folder)
    except Exception as error:  # transformers fails in many ways on broken configurations
        raise UserError(f"{folder}: its config.json can't be read ({first_line(error)})") from error
    return Source(name, folder, adapter, config)


def read_source(source: Source) -> tuple[Reading, Tensors]:
    """Asks the model, and hands on its tensors, merged, under the names they have in files. The model is out of memory
    again by then, if it can be: neither quantised, nor an adapter of an unusual kind.

    The logits are those of the adapter beside its base, quantised or not, as it was trained: so merging is checked.
    """
    model, processor = load(source.folder)
    text: Any = source.config.text_config
    probe = make_probe(processor, text.vocab_size, context_length(text))
    attached = model if source.adapter is None else attach_adapter(model, source.adapter)
    base = None
    if source.adapter is not None:
        with attached.disable_adapter():
            base = logits(attached, probe)
    reading = Reading(processor, probe, logits(attached, probe), base)
    if source.quantised:
        del model, attached
        release()
        model = _in_full_precision(source)
    elif (streamed := _streamed(source)) is not None:
        del model, attached
        release()
        return reading, streamed
    else:
        model = fold(attached)
    return reading, InMemory(file_tensors(model))


def _streamed(source: Source) -> Tensors | None:
    """The tensors as they lie in files, LoRA added when they are read. None where that needs the whole model."""
    files = SafetensorsFiles(weight_files(source.folder))
    if source.adapter is None:
        return files
    if unusual(source.adapter) is not None:
        return None
    lora, scaling = read_lora(source.adapter, lambda name: name.removeprefix("base_model.model."))
    targets = {f"{name.rpartition('.lora_')[0]}.weight" for name in lora.shapes}
    if not targets <= set(files.shapes):  # transformers keeps these layers under other names than their files
        return None
    return WithLora(files, lora, scaling, str(source.adapter))


def _in_full_precision(source: Source) -> VisionLanguageModel:
    # read again: on CPUs the first forward of bitsandbytes repacks its layers, and rounds their scales
    model, _ = load(source.folder)
    dequantise(model)
    if source.adapter is not None:
        model = fold(attach_adapter(model, source.adapter))
    nn.Module.to(model, source.dtype)  # transformers' own refuses, as it takes the model for a quantised one still
    return model


def dequantise(model: nn.Module) -> None:
    """Puts ordinary float32 layers in the place of bitsandbytes' 4-bit ones. UserError for other quantisations."""
    try:
        bitsandbytes: Any = import_module("bitsandbytes")
    except ImportError:
        raise UserError("a quantised model needs bitsandbytes: pip install 'vlm[quant]'") from None
    kind = bitsandbytes.nn.Linear4bit
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not found:
        raise UserError("the base is quantised in another way than bitsandbytes' 4 bit, which can't be undone here")
    for name, module in found.items():
        state = module.weight.quant_state
        state.dtype = torch.float32
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(bitsandbytes.functional.dequantize_4bit(module.weight.data, state).float())
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.data.float())
        model.set_submodule(name, plain)
