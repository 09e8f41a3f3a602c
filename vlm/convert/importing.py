"""`vlm import`: a model of another layout becomes a folder of ours, its tensors streamed from file to file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from vlm.checkpoint import check_source, written_aside
from vlm.configuration import VisionLanguageConfig
from vlm.convert import llava
from vlm.convert.images import image_processor, read_image_settings
from vlm.convert.keys import dropped, from_llava, match, skeleton
from vlm.convert.sources import check_target, fetch, read_chat_template, read_settings, read_tokenizer, with_beginning
from vlm.convert.tensors import Progress, Renamed, SafetensorsFiles, Tensors, weight_files, write_tensors
from vlm.errors import UserError
from vlm.processing import VisionLanguageProcessor

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


def import_model(
    source: str,
    out: Path,
    progress: Progress,
    base: str | None = None,
    vision_tower: str | None = None,
    chat_template: Path | None = None,
) -> list[str]:
    """Writes our folder of a folder or hub id. Returns what people should know about it.

    UserError in one sentence for what can't be read; `out` then stays as it was.
    """
    check_target(out)
    folder = fetch(source)
    written = read_settings(folder / "config.json")
    kind = written.get("model_type")
    if kind in llava.CONFIGS:
        imported = read_llava(folder, written, chat_template)
    else:
        raise UserError(f"{source}: a {kind!r} model; {', '.join(llava.CONFIGS)} can be imported")
    write_imported(imported, out, progress)
    return imported.notes


def read_llava(folder: Path, written: dict[str, Any], chat_template: Path | None) -> Imported:
    """A LLaVA or LLaVA-NeXT folder of transformers 4.x or 5.x."""
    where = str(folder)
    check_source(folder)
    config = llava.read_config(written, where)
    frame = skeleton(config)
    files = SafetensorsFiles(weight_files(folder))
    if not config.tie_word_embeddings and not any(name.endswith("lm_head.weight") for name in files.shapes):
        raise UserError(f"{where}: no lm_head in its weights, and its config.json doesn't tie it to the embeddings")
    used = match(files, {name: from_llava(name, frame) for name in files.shapes}, frame, where)
    notes = []
    if left := dropped(files, used):
        notes.append(f"left out, since every model makes them anew: {', '.join(left)}")
    tokenizer = read_tokenizer(folder)
    token = tokenizer.convert_ids_to_tokens(config.image_token_id) if config.image_token_id < len(tokenizer) else None
    if token is None or config.image_token_id not in tokenizer.added_tokens_decoder:
        raise UserError(
            f"{where}: its tokenizer has no image token (number {config.image_token_id}, as its config.json says)"
        )
    check_vocabulary(tokenizer, config, where)
    template = read_chat_template(folder, tokenizer, chat_template)
    if template is None:
        raise UserError(NO_TEMPLATE.format(folder=folder))
    images = read_image_settings(folder)
    own = written.get("image_grid_pinpoints")
    if own is not None and images.get("image_grid_pinpoints", own) != own:
        raise UserError(f"{where}: image_grid_pinpoints of its config.json and of its image settings differ")
    generation = folder / "generation_config.json"
    return Imported(
        config,
        Renamed(files, used),
        tokenizer,
        token,
        with_beginning(template, tokenizer),
        image_processor(images, where),
        read_settings(generation) if generation.is_file() else None,
        notes,
    )


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
        if imported.generation is not None:
            text = json.dumps(imported.generation, indent=2) + "\n"
            (partial / "generation_config.json").write_text(text, encoding="utf-8")
