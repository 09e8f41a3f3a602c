"""Model folders: loading with the doors shut (no pickles, no remote code), saving whole or not at all."""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from vlm import self_test
from vlm.auto import register
from vlm.errors import DiskFullError, UserError, disk_full, first_line, room_for
from vlm.hub import fetch
from vlm.modeling import VisionLanguageModel
from vlm.processing import VisionLanguageProcessor

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
ADAPTER_CONFIG = "adapter_config.json"


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    adapter: Path | None = None,
) -> tuple[VisionLanguageModel, VisionLanguageProcessor]:
    """The model and processor of a folder or hub id, in eval mode. A folder that holds an adapter loads its base, too.

    dtype None keeps the dtype of the files. UserError with one sentence for anything that is not a model of ours.
    """
    folder = fetch(source)
    if (folder / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise UserError(f"{adapter}: its base {folder} is an adapter, too; merge that one first")
        base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base:
            raise UserError(f"{folder}: an adapter that doesn't name its base model")
        return load(base, device, dtype, adapter=folder)
    check_source(folder, model_type="vlm")
    register()
    try:
        with quietly():
            model, report = VisionLanguageModel.from_pretrained(
                folder,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below: transformers only logs which they are
            )
            processor = VisionLanguageProcessor.from_pretrained(folder, trust_remote_code=False)
    except SafetensorError as error:
        raise UserError(f"{source}: the weights are cut off or broken ({error})") from None
    except Exception as error:  # transformers fails in many ways on broken folders
        raise UserError(f"{source}: cannot be loaded ({first_line(error)})") from error
    check_complete(source, report)
    if left := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{source}: its config.json has no place for {len(left)} of its tensors, the first is {left[0]}"
        )
    if processor.image_tokens != model.config.image_tokens:
        raise UserError(
            f"{source}: processor_config.json counts image tokens for another model than config.json "
            f"({processor.image_tokens} instead of {model.config.image_tokens}); use the one saved with the model"
        )
    if not processor.chat_template:
        raise UserError(f"{source}: no chat template in it (chat_template.jinja), so it can't be asked anything")
    if adapter is not None:
        model = merge_adapter(model, adapter)
    return model.to(device).eval(), processor


def check_complete(source: str | Path, report: dict[str, Any]) -> None:
    """UserError where a model's files lack tensors, or have them in other shapes: transformers draws them at random."""
    if other := sorted(report["mismatched_keys"]):
        name, there, asked = other[0]
        raise UserError(
            f"{source}: its weights don't fit its config.json: {name} is {list(there)} there, and "
            f"{list(asked)} is asked for"
        )
    if lacking := sorted(report["missing_keys"]):
        raise UserError(f"{source}: its weights lack {len(lacking)} tensors, the first is {lacking[0]}")


def merge_adapter(model: VisionLanguageModel, adapter: Path) -> VisionLanguageModel:
    """The model with a LoRA folder merged into its weights, each layer in float32."""
    return fold(attach_adapter(model, adapter))


def attach_adapter(model: VisionLanguageModel, adapter: Path) -> Any:
    """The model with a LoRA folder beside its weights. UserError unless every tensor of the one fits the other."""
    from peft import PeftModel, get_peft_model_state_dict

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{adapter}: no adapter_model.safetensors there")
    try:
        with safe_open(file, framework="pt") as tensors, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # ours below is an error
            there = set(tensors.keys())
            attached = PeftModel.from_pretrained(model, str(adapter))
            needed = set(get_peft_model_state_dict(attached, save_embedding_layers=False))
    except Exception as error:  # peft fails in many ways on broken folders
        raise UserError(f"{adapter}: doesn't fit its base model, or is broken ({first_line(error)})") from error
    for what, names in (("lacks", needed - there), ("has, and its base model has no place for,", there - needed)):
        if names:
            raise UserError(f"{adapter}: {what} {len(names)} tensors, the first is {min(names)}")
    return attached


def fold(attached: Any) -> VisionLanguageModel:
    """Adds attached adapters to the weights: in float32, then rounded once to the number format of each layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in attached.modules():
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            dtype = base.weight.dtype
            plain = dtype.is_floating_point  # a quantised layer rounds in its own way
            if plain:
                base.float()
            layer.merge()
            if plain:
                base.to(dtype)
    merged: VisionLanguageModel = attached.unload()
    return merged


def check_source(folder: Path, model_type: str | None = None, pickles: bool = False) -> dict[str, Any]:
    """config.json of a model folder. UserError if it is no model, or brings code, or (unless allowed) only pickles."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder (no config.json in it)")
    config = read_object(folder / "config.json")
    if asks_for_code(config):
        raise UserError(f"{folder}: its config asks to run code from the folder (auto_map); that is never done")
    if not list(folder.glob("*.safetensors")):
        pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
        if not pickled:
            raise UserError(f"{folder}: no *.safetensors in it")
        if not pickles:
            raise UserError(f"{folder}: only pickled weights ({pickled[0]}), which are never loaded")
    if model_type is not None and config.get("model_type") != model_type:
        hint = "; vlm import makes one of it" if str(config.get("model_type")).startswith("llava") else ""
        raise UserError(f"{folder}: a {config.get('model_type')!r} model, where a {model_type!r} model is needed{hint}")
    return config


def asks_for_code(config: dict[str, Any]) -> bool:
    """Whether a settings file names code of its own folder, which is never run."""
    parts = [part for part in config.values() if isinstance(part, dict)]
    return "auto_map" in config or any(asks_for_code(part) for part in parts)


def save(model: Any, processor: Any, folder: Path, extra: dict[str, str] | None = None) -> None:
    """Writes a Hugging Face folder; an older one there is replaced only once the new one is whole.

    extra: further text files by name (a model card, say). Beside a model that takes images goes its self-test.
    UserError, and nothing is written, where a tensor holds a value that isn't finite.
    """
    check_finite(model.state_dict().items(), folder)
    with written_aside(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        pin_tokenizer(partial)
        if isinstance(model, VisionLanguageModel):
            self_test.write(model, processor, partial)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8")


def check_finite(tensors: Iterable[tuple[str, Any]], where: object) -> None:
    """UserError that names a tensor with a value that isn't finite, before it is written to `where`."""
    for name, tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: not written, since {name} holds values that are not finite")


def pin_tokenizer(folder: Path, **settings: str) -> None:
    """Rewrites tokenizer_config.json so that tokenizer.json alone decides about tokens; `settings` go in, too.

    Classes of model families build their tokenizers anew when they are loaded, from settings that saving may lose
    (Llama's `legacy`), and in each version in another way. transformers 4.x knows neither 5.x's own class nor its lists
    of special tokens; 5.x reads the old names, too.
    """
    path = folder / "tokenizer_config.json"
    known = read_object(path)
    for name in ("backend", "is_local", "local_files_only"):  # how and where it was loaded
        known.pop(name, None)
    known |= {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    if isinstance(known.get("extra_special_tokens"), list):
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well, and vanishes when it doesn't.

    DiskFullError where there is no room for it.
    """
    folder = folder.resolve()  # "." has no name, and a link would be replaced instead of what it leads to
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a file, where a folder is to be written")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        kind = DiskFullError if disk_full(error) else UserError
        raise kind(f"{folder}: can't be written ({error.strerror})") from None
    try:
        with room_for(folder):
            yield partial
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
            try:
                partial.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def quietly() -> Iterator[None]:
    """No bar of transformers' for reading a local file."""
    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def link_folder(source: Path, target: Path) -> None:
    """A copy of a folder that shares its files' disk space where the disk can."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    with written_aside(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True, copy_function=link)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError when it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
