"""A handful of synthetic scenes, drawn once."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.scenes.write import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=40, heldout=12, unseen=6, lessons=20, text_rows=40, processes=1)
    return folder
