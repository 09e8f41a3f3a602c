"""A model that was read from another layout, and its folder of ours."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from vlm import self_test
from vlm.checkpoint import load, pin_tokenizer, written_aside
from vlm.configuration import VisionLanguageConfig
from vlm.convert.tensors import Progress, Tensors, write_tensors
from vlm.errors import UserError
from vlm.processing import VisionLanguageProcessor

ROOM = 1.3  # memory that a model takes while it is loaded and asked, by the size of its files
NO_TEMPLATE = "{folder}: no chat template in it; give one with --chat-template FILE"


@dataclass
class Imported:
    """A model that was read, but none of its tensors yet. notes: what people should know about how it was read."""

    config: VisionLanguageConfig
    tensors: Tensors
    tokenizer: PreTrainedTokenizerBase
    image_token: str
    chat_template: str
    images: BaseImageProcessor
    generation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: VisionLanguageConfig, where: str) -> None:
    """UserError when the tokenizer has tokens that the embeddings lack; more embeddings than tokens are padding."""
    text: Any = config.text_config
    if len(tokenizer) > text.vocab_size:
        raise UserError(f"{where}: {len(tokenizer)} tokens in its tokenizer, but only {text.vocab_size} embeddings")


def write_imported(imported: Imported, out: Path, progress: Progress) -> None:
    config, tokenizer = imported.config, imported.tokenizer
    if config.dtype is None:
        config.dtype = imported.tensors.read(next(iter(imported.tensors.shapes))).dtype
    config.architectures = ["VisionLanguageModel"]
    tokenizer.padding_side = "left"
    processor = VisionLanguageProcessor(
        image_processor=imported.images,
        tokenizer=tokenizer,
        chat_template=imported.chat_template,
        image_token=imported.image_token,
        image_tokens=config.image_tokens,
    )
    with written_aside(out) as partial:
        write_tensors(partial, imported.tensors, progress)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        pin_tokenizer(partial)
        if imported.generation is not None:
            text = json.dumps(imported.generation, indent=2) + "\n"
            (partial / "generation_config.json").write_text(text, encoding="utf-8")


def add_self_test(folder: Path) -> str | None:
    """Puts a self-test into a folder that was imported, where there is memory for the model (importing needs little).

    Returns what people should know, if there is none.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if ROOM * size > free:
        return (
            f"no {self_test.FILE}, by which servers check the model: it takes {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free; vlm export {folder} --to vlm --out DIR writes one elsewhere"
        )
    model, processor = load(folder)
    self_test.write(model, processor, folder)
    return None
