"""Recipes of tiny models that train in seconds."""

from pathlib import Path
from typing import Any

import yaml

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
CONNECTORS = {
    "mlp": {"type": "mlp", "depth": 2},
    "perceiver": {"type": "perceiver", "num_latents": 4, "depth": 1, "heads": 2, "head_dim": 16},
}


def chat_recipe(scenes: Path, fusion: str = "early", connector: str = "mlp", **stage: Any) -> dict[str, Any]:
    """Settings of a run with one chat stage over random weights; `stage` replaces settings of it."""
    rates = {"connector": 2e-3, "language_model": 2e-3}
    if fusion == "deep":
        rates |= {"cross_attention": 2e-3, "gates": 1e-2}
    return {
        "model": {
            "vision": {"config": VISION},
            "language": {"config": LANGUAGE},
            "tokenizer_vocab": 330,
            "fusion": fusion,
            "connector": CONNECTORS[connector],
            "cross_attention": {"heads": 2, "head_dim": 16},
        },
        "stages": [
            {
                "name": "chat",
                "objective": "chat",
                "data": [{"path": "chat.jsonl"}],
                "steps": 6,
                "batch_size": 4,
                "learning_rates": rates,
                **stage,
            }
        ],
        "data_root": str(scenes),
        "threads": 1,
        "checkpoint_every": 3,
    }


def with_contrastive_stage(recipe: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """The recipe with a contrastive stage `clip` before its first, on that one's data."""
    tower = {name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    model = recipe["model"] | {"text_tower": {**tower, "num_attention_heads": 2}, "projection_dim": 32}
    clip = {
        "name": "clip",
        "objective": "contrastive",
        "data": recipe["stages"][0]["data"],
        "steps": 2,
        "batch_size": 4,
        "learning_rates": {"vision_tower": 1e-3, "text_tower": 1e-3, "projections": 1e-3},
        **stage,
    }
    return {**recipe, "model": model, "stages": [clip, *recipe["stages"]]}


def write_recipe(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
