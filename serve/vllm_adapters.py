"""LoRA folders for vLLM: which can be served beside their base, and by which flags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlm.checkpoint import ADAPTER_CONFIG, read_object
from vlm.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM knows
CONNECTOR = "multi_modal_projector."
UNREACHED = {"vision_tower.": "the vision encoder", "second_vision_tower.": "the vision encoder"}
UNREACHED["cross_attention."] = "the gated blocks"


def adapter_flags(adapters: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """vLLM's flags for adapters given as NAME=DIR beside a model with this config.json ({}: unknown).

    UserError for what vLLM can't serve, or would serve in part without a word.
    """
    if not adapters:
        return []
    folders = dict(_parse(adapter) for adapter in adapters)
    flags = ["--enable-lora", "--max-lora-rank", str(_rank(folders))]
    # a slot more than adapters: on a CPU, requests of the base take what is in the last one where they share a batch
    flags += ["--max-loras", str(len(folders) + 1)]
    connector = [name for name, folder in folders.items() if any(CONNECTOR in key for key in _tensors(folder))]
    if connector:
        kind = dict(config.get("connector") or {}).get("type", "mlp")
        kind = f"{kind} of deep fusion" if config.get("fusion") == "deep" else kind
        if kind != "mlp":
            told = (
                f"--adapter {connector[0]}: changes its connector ({kind}); vLLM's LoRA reaches early fusion's mlp only"
            )
            raise UserError(f"{told}; {_merge(str(folders[connector[0]]))}")
        flags.append("--enable-tower-connector-lora")
    return [*flags, "--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]


def _parse(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UserError(f"--adapter {text}: must be NAME=DIR")
    path = Path(folder).expanduser().resolve()
    if not (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"--adapter {text}: no LoRA adapter there (no {ADAPTER_CONFIG})")
    settings = read_object(path / ADAPTER_CONFIG)
    if settings.get("modules_to_save"):
        whole = ", ".join(settings["modules_to_save"])
        raise UserError(f"--adapter {text}: replaces whole modules ({whole}), which vLLM can't; {_merge(folder)}")
    if settings.get("use_dora"):
        raise UserError(f"--adapter {text}: is of DoRA's kind, which vLLM can't serve; {_merge(folder)}")
    for part, called in UNREACHED.items():
        if any(key.startswith(part) or f".{part}" in key for key in _tensors(path)):
            raise UserError(f"--adapter {text}: changes {called}, which vLLM leaves as it is; {_merge(folder)}")
    return name, path


def _merge(folder: str) -> str:
    return f"merge it: vlm export {folder} --to vlm --out MERGED"


def _tensors(folder: Path) -> list[str]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder}: no adapter_model.safetensors there")
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: cut off or broken ({error})") from None


def _rank(folders: Mapping[str, Path]) -> int:
    """The least rank that vLLM knows and all adapters fit into."""
    wanted = max(int(read_object(folder / ADAPTER_CONFIG).get("r", 8)) for folder in folders.values())
    rank = next((rank for rank in RANKS if rank >= wanted), None)
    if rank is None:
        raise UserError(f"an adapter of rank {wanted}: vLLM serves ranks up to {RANKS[-1]}")
    return rank
