"""OpenFlamingo checkpoints onto deep fusion: the parts that it trained, over a language model and a CLIP of one's own.

What they hold is read off open_flamingo/src/{helpers,flamingo,flamingo_lm,factory}.py of OpenFlamingo 2.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken

from vlm.convert.images import image_processor, read_image_settings
from vlm.convert.imported import Imported
from vlm.convert.keys import match, skeleton
from vlm.convert.llava import build_config
from vlm.convert.parts import (
    Cut,
    Part,
    read_generation,
    read_language_model,
    read_tokenizer_of,
    read_tower,
)
from vlm.convert.sources import read_chat_template
from vlm.convert.tensors import Floats, InMemory, Joined, PickledTensors, Renamed, Tensors
from vlm.errors import UserError
from vlm.fusion import gated_layer_indices
from vlm.templates import fit_template
from vlm.tokenization import IMAGE_TOKEN, add_image_token

END_OF_CHUNK = "<|endofchunk|>"
HEAD_DIM = 64  # of both kinds of attention; no file says it
FRAMES = "perceiver.frame_embs"
# ours, and theirs as a pattern
TABLE = (
    ("multi_modal_projector.latents", r"perceiver\.latents"),
    (r"multi_modal_projector.layers.\1.attention.\2", r"perceiver\.layers\.(\d+)\.0\.(.+)"),
    (r"multi_modal_projector.layers.\1.feed_forward.\2", r"perceiver\.layers\.(\d+)\.1\.(.+)"),
    (r"multi_modal_projector.norm.\1", r"perceiver\.norm\.(.+)"),
    (r"cross_attention.\1.\2", r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.(.+_gate)"),
    (r"cross_attention.\1.feed_forward.\2", r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.ff\.(.+)"),
    (r"cross_attention.\1.\2", r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.attn\.(.+)"),
    (r"language_model.\1", r"lang_encoder\.(.+)"),
)
# OpenFlamingo's prompts are images, a text, and what the model adds to it, chunk by chunk
CHUNKS = (
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message.role == 'assistant' -%}{{- '<|endofchunk|>' -}}{%- endif -%}"
    "{%- endfor -%}"
)


def read_flamingo(path: Path, base: str | None, vision_tower: str | None, chat_template: Path | None) -> Imported:
    """A checkpoint file, with the language model and the CLIP that it was trained over."""
    where = str(path)
    if base is None or vision_tower is None:
        raise UserError(f"{where}: holds what was trained alone; name the rest with --base LM --vision-tower TOWER")
    checkpoint = _canonical(PickledTensors(path), where)
    if "perceiver.latents" not in checkpoint.shapes:
        raise UserError(f"{where}: not an OpenFlamingo checkpoint (no perceiver.latents in it)")
    text, tower = read_language_model(base), read_tower(vision_tower)
    tokenizer = read_tokenizer_of(text.config, text.folder)
    # in OpenFlamingo's order: their numbers are rows of the embeddings
    tokenizer.add_tokens(AddedToken(END_OF_CHUNK, special=True, normalized=False), special_tokens=True)
    image_token_id = add_image_token(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    vision: Any = tower.config
    text_config: Any = text.config
    tensors = _with_positions(checkpoint, (vision.image_size // vision.patch_size) ** 2)
    own = Renamed(tensors, {_ours(name): name for name in tensors.shapes})
    text_config.vocab_size = _vocabulary(own, text, len(tokenizer), where)
    config = build_config(
        where,
        fusion="deep",
        vision_config=vision.to_dict(),
        text_config=text_config.to_dict(),
        connector=_connector(checkpoint, where),
        cross_attention=_cross_attention(checkpoint, text_config.num_hidden_layers, where),
        vision_feature_layer=-1,
        vision_feature_select="patch",
        image_token_id=image_token_id,
        dtype=text_config.dtype,
    )
    frame = skeleton(config)
    head = f"language_model.{frame.head}.weight"
    joined = Cut(Joined([tower.tensors, text.tensors, own]), head, text_config.vocab_size)
    used = match(joined, {name: name for name in joined.shapes}, frame, where)
    template = read_chat_template(path.parent, tokenizer, chat_template, IMAGE_TOKEN)
    notes = []
    if template is None:
        template = fit_template(CHUNKS, tokenizer, IMAGE_TOKEN)
        notes.append(
            "no chat template: texts are joined as they are, answers end with <|endofchunk|> (--chat-template FILE)"
        )
    end = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
    generation = {**(read_generation(text.folder) or {}), "eos_token_id": [tokenizer.eos_token_id, end]}
    return Imported(
        config,
        Floats(joined, used, where),
        tokenizer,
        IMAGE_TOKEN,
        template,
        image_processor(read_image_settings(tower.folder), str(tower.folder)),
        generation,
        notes,
    )


def _canonical(held: Tensors, where: str) -> Tensors:
    """The gated blocks lie beside the LM, in its layers, or in both: the same tensors under two names."""
    names: dict[str, str] = {}
    for name in held.shapes:
        plain = re.sub(r"^module\.", "", name)
        plain = re.sub(
            r"^lang_encoder\..*\.(\d+)\.gated_cross_attn_layer\.", r"lang_encoder.gated_cross_attn_layers.\1.", plain
        )
        plain = plain.replace(".decoder_layer.", ".")
        if plain.startswith(("lang_encoder.old_decoder_blocks.", "vision_encoder.")):
            continue  # again the LM's layers; a tower that was not trained
        if plain in names and not torch.equal(held.read(name), held.read(names[plain])):
            raise UserError(f"{where}: {name} and {names[plain]} are the same tensor, and differ")
        names[plain] = name
    return Renamed(held, names)


def _ours(name: str) -> str:
    for ours, pattern in TABLE:
        if (found := re.fullmatch(pattern, name)) is not None:
            return found.expand(ours)
    return name


def _with_positions(checkpoint: Tensors, patches: int) -> Tensors:
    """An image is a video of one frame: the first frame's embedding is added to each patch."""
    if FRAMES not in checkpoint.shapes:
        return checkpoint
    first = checkpoint.read(FRAMES)[:1].expand(patches, -1)
    rest = Renamed(checkpoint, {name: name for name in checkpoint.shapes if name != FRAMES})
    return Joined([rest, InMemory({"multi_modal_projector.positions": first})])


def _connector(checkpoint: Tensors, where: str) -> dict[str, Any]:
    shapes = checkpoint.shapes
    depth = len({name.split(".")[2] for name in shapes if name.startswith("perceiver.layers.")})
    try:
        heads, widened = shapes["perceiver.layers.0.0.to_q.weight"][0], shapes["perceiver.layers.0.1.1.weight"][0]
        count, width = shapes["perceiver.latents"]
    except (KeyError, ValueError):
        raise UserError(f"{where}: no perceiver of OpenFlamingo's in it") from None
    return {
        "type": "perceiver",
        "num_latents": count,
        "depth": depth,
        "ff_mult": widened // width,
        "position_std": 1.0 if FRAMES in shapes else 0.0,
        **_heads(heads, where),
    }


def _cross_attention(checkpoint: Tensors, layers: int, where: str) -> dict[str, Any]:
    """every: deduced from the layers that have a block."""
    blocks: Mapping[int, str] = {
        int(found[1]): name
        for name in checkpoint.shapes
        if (found := re.fullmatch(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.attn\.to_q\.weight", name))
    }
    if not blocks:
        raise UserError(f"{where}: no gated cross-attention in it")
    settings = {"every": min(blocks) + 1, "attend": "last", "ffn_without_media": "apply"}
    inner, width = checkpoint.shapes[blocks[min(blocks)]]
    made = build_config(where, fusion="deep", cross_attention=settings).cross_attention_settings
    if sorted(blocks) != gated_layer_indices(made, layers):
        raise UserError(
            f"{where}: gated blocks before the layers {sorted(blocks)} of {layers}: not every {min(blocks) + 1}th; "
            "is it the checkpoint's own language model?"
        )
    fed = checkpoint.shapes.get(f"lang_encoder.gated_cross_attn_layers.{min(blocks)}.ff.1.weight", (4 * width,))[0]
    return {**settings, "ff_mult": fed // width, **_heads(inner, where)}


def _heads(inner: int, where: str) -> dict[str, int]:
    if inner % HEAD_DIM:
        raise UserError(f"{where}: attention of width {inner}, which OpenFlamingo's heads of {HEAD_DIM} don't make up")
    return {"heads": inner // HEAD_DIM, "head_dim": HEAD_DIM}


def _vocabulary(own: Tensors, text: Part, tokens: int, where: str) -> int:
    """Rows of the embeddings. UserError when no row of the added tokens is in the checkpoint."""
    embeddings = [
        name for name in own.shapes if re.search(r"(embed_tokens|embed_in|wte|lm_head|embed_out)\.weight$", name)
    ]
    width = getattr(text.config, "hidden_size", None)
    rows = {own.shapes[name][0] for name in embeddings if own.shapes[name][-1] == width}
    if not rows or min(rows) < tokens:
        found = f"only {min(rows)} rows" if rows else "none"
        raise UserError(
            f"{where}: {END_OF_CHUNK} and {IMAGE_TOKEN} make {tokens} tokens, and of their embeddings the checkpoint "
            f"has {found}"
        )
    return max(rows)
