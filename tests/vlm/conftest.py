"""Loaded tiny models, one thread."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm

Loaded = tuple[vlm.VisionLanguageModel, vlm.VisionLanguageProcessor]
LoadedModels = Callable[[str, str], Loaded]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def loaded_models(tiny_models: Callable[[str, str], Path]) -> LoadedModels:
    """(fusion, connector) -> model and processor, shared by all tests: they leave it as it is."""
    loaded: dict[tuple[str, str], Any] = {}

    def get(fusion: str, connector: str) -> Loaded:
        if (fusion, connector) not in loaded:
            loaded[fusion, connector] = vlm.load(tiny_models(fusion, connector))
        return loaded[fusion, connector]

    return get
