"""`vlm import`: a model of another layout becomes a folder of ours, its tensors streamed from file to file."""

from pathlib import Path
from typing import Any

from vlm.checkpoint import check_source
from vlm.convert import flamingo, llava, original
from vlm.convert.images import image_processor, read_image_settings
from vlm.convert.imported import NO_TEMPLATE, Imported, check_vocabulary, write_imported
from vlm.convert.keys import dropped, from_llava, match, skeleton
from vlm.convert.sources import check_target, read_chat_template, read_settings, read_tokenizer, refuse_quantised
from vlm.convert.tensors import Floats, Progress, SafetensorsFiles, weight_files
from vlm.errors import UserError
from vlm.hub import PICKLES, SETTINGS, WEIGHTS, fetch


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
    if (checkpoint := _lone_checkpoint(source, bool(base and vision_tower))) is not None:
        imported = flamingo.read_flamingo(checkpoint, base, vision_tower, chat_template)
        write_imported(imported, out, progress)
        return imported.notes
    folder = fetch(source)
    written = read_settings(folder / "config.json")
    if not isinstance(written.get("model_type"), str):
        raise UserError(f"{source}: the model_type in its config.json is {written.get('model_type')!r}, and no name")
    if original.is_original(written):
        folder = fetch(source, *SETTINGS, *WEIGHTS, *PICKLES)
        imported = original.read_original(folder, written, base, vision_tower, chat_template)
    elif base or vision_tower:
        raise UserError(
            f"{source}: holds its own language model and vision encoder; leave out --base and --vision-tower"
        )
    elif written.get("model_type") in llava.CONFIGS:
        imported = read_llava(folder, written, chat_template)
    else:
        kinds = ", ".join([*llava.CONFIGS, *original.LANGUAGE_MODELS])
        raise UserError(f"{source}: a {written.get('model_type')!r} model; {kinds} can be imported")
    write_imported(imported, out, progress)
    return imported.notes


def _lone_checkpoint(source: str, with_parts: bool) -> Path | None:
    """The file that a source is, or (where the rest of a model is named, too) the one .pt in a folder without a
    config.json: OpenFlamingo's repositories hold nothing else."""
    if Path(source).is_file():
        return Path(source)
    if not with_parts:
        return None
    folder = fetch(source, *SETTINGS, *WEIGHTS, *PICKLES)
    checkpoints = list(folder.glob("*.pt"))
    return checkpoints[0] if len(checkpoints) == 1 and not (folder / "config.json").is_file() else None


def read_llava(folder: Path, written: dict[str, Any], chat_template: Path | None) -> Imported:
    """A LLaVA or LLaVA-NeXT folder of transformers 4.x or 5.x."""
    where = str(folder)
    check_source(folder)
    refuse_quantised(written, where)
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
    token = (
        tokenizer.convert_ids_to_tokens(config.image_token_id) if 0 <= config.image_token_id < len(tokenizer) else None
    )
    if token is None or config.image_token_id not in tokenizer.added_tokens_decoder:
        raise UserError(
            f"{where}: its tokenizer has no image token (number {config.image_token_id}, as its config.json says)"
        )
    check_vocabulary(tokenizer, config, where)
    template = read_chat_template(folder, tokenizer, chat_template, token)
    if template is None:
        raise UserError(NO_TEMPLATE.format(folder=folder))
    images = read_image_settings(folder)
    own = written.get("image_grid_pinpoints")
    if own is not None and images.get("image_grid_pinpoints", own) != own:
        raise UserError(f"{where}: image_grid_pinpoints of its config.json and of its image settings differ")
    generation = folder / "generation_config.json"
    return Imported(
        config,
        Floats(files, used, where),
        tokenizer,
        token,
        template,
        image_processor(images, where),
        read_settings(generation) if generation.is_file() else None,
        notes,
    )
