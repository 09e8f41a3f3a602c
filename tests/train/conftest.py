"""A handful of synthetic scenes, a model that has seen them once, and questions to ask it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.train.evaluations import write_rows
from tests.train.recipes import chat_recipe, write_recipe
from vlm.cli import main


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.scenes.write import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=40, heldout=12, unseen=6, lessons=20, text_rows=40, processes=1)
    return folder


@pytest.fixture(scope="session")
def model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = write_recipe(folder / "r.yaml", chat_recipe(scenes, steps=1))
    assert main(["train", str(recipe), "--out", str(folder / "run")]) == 0
    return folder / "run" / "model"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions on four pictures."""
    folder = tmp_path_factory.mktemp("questions")
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 200 - 40 * number, 90)).save(folder / f"{number}.png")
    rows = [
        {"id": f"q{n}", "image": f"{n % 4}.png", "question": "what " * (n + 1), "answer": "red", "kind": f"k{n % 2}"}
        for n in range(12)
    ]
    return write_rows(folder / "q.jsonl", rows)
