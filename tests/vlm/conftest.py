"""Loaded tiny models, one thread."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from tests.vlm.llavas import make_llava

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


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A LLaVA folder of the installed transformers, to be left as it is."""
    return make_llava(tmp_path_factory.mktemp("llava") / "llava", tiny_tokenizer)


@pytest.fixture
def copied(llava: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(llava, tmp_path / "copied"))
