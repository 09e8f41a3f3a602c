"""How much memory `vlm export` needs: python tests/benchmarks/export_memory.py [GIGABYTES ...]

Builds random bfloat16 models of these sizes (2 and 4) in a temporary folder, exports each in a process of its own and
prints that process's largest resident set beside the aim, 1.3 times the model and 1 GB. Twice the model is needed on
the disk.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from support import COMMAND

from vlm import VisionLanguageConfig
from vlm.convert.keys import skeleton
from vlm.convert.tensors import Shape, write_tensors
from vlm.processing import make_processor
from vlm.tokenization import IMAGE_TOKEN, train_tokenizer

BYTES = 2  # of a number


class Drawn:
    """Small random tensors of these shapes, drawn when they are read."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes = shapes

    def read(self, name: str) -> torch.Tensor:
        return torch.randn(self.shapes[name], dtype=torch.bfloat16) * 0.02


def build(folder: Path, gigabytes: float) -> float:
    """Writes a model of about this size, a CLIP-L below a Llama of as many layers as it takes. Returns its size."""
    tokenizer = train_tokenizer(["a red ball"], vocab_size=320, context=2048)
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }

    def made(layers: int) -> tuple[VisionLanguageConfig, dict[str, Shape], float]:
        config = VisionLanguageConfig(
            vision_config=vision,
            text_config={**text, "num_hidden_layers": layers},
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            dtype="bfloat16",
        )
        shapes = skeleton(config).shapes
        return config, shapes, sum(torch.Size(shape).numel() for shape in shapes.values()) * BYTES / 1e9

    least, more = made(1)[2], made(2)[2]
    config, shapes, size = made(1 + round((gigabytes - least) / (more - least)))
    folder.mkdir()
    write_tensors(folder, Drawn(shapes), lambda *_: None)
    config.save_pretrained(folder)
    make_processor(config, tokenizer).save_pretrained(folder)
    return size


def peak_of(command: list[str]) -> float:
    """Gigabytes of the largest resident set of a command."""
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit("the export failed; its message stands above")
    return usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    for wanted in [float(word) for word in sys.argv[1:]] or [2.0, 4.0]:
        with tempfile.TemporaryDirectory() as folder:
            size = build(Path(folder) / "model", wanted)
            options = ["export", f"{folder}/model", "--to", "llava-hf", "--out", f"{folder}/exported"]
            began = time.perf_counter()
            peak = peak_of([*COMMAND, *options])
            seconds = time.perf_counter() - began
        figures = {"model_gb": size, "peak_gb": peak, "aim_gb": 1.3 * size + 1, "seconds": seconds}
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
