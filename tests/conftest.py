"""Tiny random models, made once per test run, for every package."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm.threads import settle_threads

settle_threads()  # before anything loads torch

IMAGE_SIZE, PATCH_SIZE, CONTEXT = 32, 8, 512
TEXTS = ["what colour is the ball? the ball is red.", "how many cubes are left of the cone? two."]

TinyModels = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests ask this machine alone. Libraries that ask others in passing hide that it failed; it is told afterwards."""
    asked: list[Any] = []
    look_up = socket.getaddrinfo

    def look_up_here(host: Any, *rest: Any, **options: Any) -> Any:
        if host in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1", socket.gethostname()):
            return look_up(host, *rest, **options)
        if not str(host).endswith(".invalid"):  # reserved for names that nobody has (RFC 2606)
            asked.append(host)
        raise socket.gaierror(f"tests ask nobody but this machine, not {host}")

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    yield
    assert not asked


@pytest.fixture(scope="session")
def bf16_attention() -> None:
    """Skips a test where torch's own attention can't compute in bf16: under an ATEN_CPU_CAPABILITY below what the
    processor has it takes instructions that it was told not to use ("pack_vnni2 is only supported when ...")."""
    import torch

    query = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        capability = os.environ.get("ATEN_CPU_CAPABILITY")
        assert capability, "bf16 attention fails, and nothing holds the processor's instructions back"
        pytest.skip(f"torch's bf16 attention fails under ATEN_CPU_CAPABILITY={capability} here: {error}")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level, with the project's chat template and special tokens."""
    from vlm.tokenization import train_tokenizer

    return train_tokenizer(TEXTS, vocab_size=320, context=CONTEXT)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> TinyModels:
    """(fusion, connector) -> folder of a random float32 model with its processor. Deep gates stand open, at 0.5."""
    folders: dict[tuple[str, str], Path] = {}

    def make(fusion: str, connector: str) -> Path:
        if (fusion, connector) not in folders:
            folder = tmp_path_factory.mktemp(f"{fusion}-{connector}") / "model"
            build_tiny_model(folder, tiny_tokenizer, fusion, connector)
            folders[fusion, connector] = folder
        return folders[fusion, connector]

    return make


def build_tiny_model(folder: Path, tokenizer: Any, fusion: str, connector: str, **text_settings: Any) -> None:
    """Saves a random model; text_settings go into the LM's configuration."""
    import torch

    from vlm import VisionLanguageConfig, VisionLanguageModel, save
    from vlm.processing import make_processor
    from vlm.tokenization import IMAGE_TOKEN

    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,  # wide enough for answers that differ with the prompt
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = VisionLanguageConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "initializer_factor": 4.0,
        },
        text_config={**text, **text_settings},
        fusion=fusion,
        connector={"type": connector, "num_latents": 4, "depth": 2, "heads": 2, "head_dim": 16},
        cross_attention={"heads": 2, "head_dim": 16} if fusion == "deep" else None,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    torch.set_rng_state(generator_state)
    for block in model.cross_attention.values():
        torch.nn.init.constant_(block.attn_gate, 0.5)
        torch.nn.init.constant_(block.ff_gate, 0.5)
    processor = make_processor(config, tokenizer)
    save(model, processor, folder)
