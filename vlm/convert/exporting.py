"""`vlm export`: a model for the rest of the world, adapters merged, checked against its source before it is kept."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vlm import self_test
from vlm.checkpoint import load, pin_tokenizer, quietly, written_aside
from vlm.convert import llava
from vlm.convert.card import model_card
from vlm.convert.hf_processor import check_processor, llava_pixels, write_processor
from vlm.convert.keys import skeleton, to_llava
from vlm.convert.merge import Reading, Source, open_source, read_source
from vlm.convert.parity import Difference, compare, logits, release
from vlm.convert.sources import check_target
from vlm.convert.tensors import Progress, Renamed, Tensors, write_tensors
from vlm.errors import UserError, first_line


def export_model(model: str, to: str, out: Path, progress: Progress) -> Difference:
    """Writes a folder in the layout `to` ("llava-hf" or "vlm"). Returns how far its logits are from the source's.

    UserError in one sentence for what can't be read or expressed, and when the folder doesn't answer as its source
    does; `out` then stays as it was. Source and copy are never in memory together.
    """
    check_target(out)
    source = open_source(model)
    as_llava = to == "llava-hf"
    if as_llava:
        llava.write_config(source.config)  # what can't be expressed is refused before anything is read
    with written_aside(out) as partial:
        reading, tensors = read_source(source)
        shapes = tensors.shapes
        write_tensors(partial, _renamed(source, tensors) if as_llava else tensors, progress)
        del tensors
        release()
        precision = torch.bfloat16 if source.quantised else source.dtype  # that of bitsandbytes' layers on CPUs
        if source.quantised:
            del source.config.quantization_config
        if as_llava:
            text = json.dumps(llava.write_config(source.config), indent=2, sort_keys=True) + "\n"
            (partial / "config.json").write_text(text, encoding="utf-8")
            write_processor(reading.processor, source.config, partial)
        else:
            source.config.save_pretrained(partial)
            reading.processor.save_pretrained(partial)
            pin_tokenizer(partial)
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, partial / generation.name)
        parameters = sum(math.prod(shape) for shape in shapes.values())
        card = model_card(source.config, out.absolute().name, source.folder, source.adapter, parameters, to)
        (partial / "README.md").write_text(card, encoding="utf-8")
        got = _llava_logits(partial, source, reading) if as_llava else _own_logits(partial, reading)
        return compare(reading.expected, got, precision, reading.base)


def _renamed(source: Source, tensors: Tensors) -> Tensors:
    frame = skeleton(source.config)
    vision: Any = source.config.vision_config
    return Renamed(tensors, {to_llava(name, frame, vision.model_type): name for name in tensors.shapes})


def _llava_logits(folder: Path, source: Source, reading: Reading) -> list[torch.Tensor]:
    """With transformers' own classes, as its users load the folder."""
    try:
        check_processor(folder, reading.processor, source.config, reading.probe)
        with quietly():
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
        if wrong := sorted([*report["missing_keys"], *report["unexpected_keys"]]):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"transformers' LLaVA has no place for, or lacks, {wrong[0]}{more}; use --to vlm")
        got = logits(model, reading.probe, llava_pixels(source.config, reading.probe.pixels))
    except UserError:
        raise
    except Exception as error:  # transformers fails in many ways on folders that it doesn't like
        raise UserError(
            f"transformers' LLaVA can't load what was written ({first_line(error)}); use --to vlm"
        ) from error
    own = reading.processor
    self_test.write(model, own, folder, lambda images: llava_pixels(source.config, own.pixels(images)))
    return got


def _own_logits(folder: Path, reading: Reading) -> list[torch.Tensor]:
    model, processor = load(folder)
    got = logits(model, reading.probe)
    self_test.write(model, processor, folder)
    return got
