"""CLIPScore against transformers' CLIP of random weights, one caption and one picture at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from data.benchmarks import java
from tests.data.benchmarks.files import score, write
from vlm.contrastive import make_clip

CAPTIONS = {1: ["a dog runs", "the dog"], 2: ["two men sit on a bench"], 3: ["a red car", "cars", "a car waits"]}
SAID = {1: "a dog", 2: "a very long caption " * 30, 3: "cars"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    text = {**small, **ids, "vocab_size": len(tiny_tokenizer), "max_position_embeddings": 24, "bos_token_id": None}
    torch.manual_seed(0)
    model = make_clip({**small, "image_size": 32, "patch_size": 8, "initializer_factor": 4.0}, text, 16)
    torch.nn.init.normal_(model.text_projection.weight, std=0.5)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Predictions and references, with pictures in the folder of the references' image set."""
    monkeypatch.setattr(java, "missing", lambda: "this takes seconds")
    rng = np.random.default_rng(0)
    for number in CAPTIONS:
        path = tmp_path / f"val2014/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    images = [{"id": n, "file_name": f"{n}.png"} for n in CAPTIONS]
    rows = [{"image_id": n, "caption": text} for n, texts in CAPTIONS.items() for text in texts]
    said = [{"image_id": n, "caption": text} for n, text in SAID.items()]
    references = write(tmp_path / "captions_val2014.json", {"images": images, "annotations": rows})
    return write(tmp_path / "said.json", said), references


class Oracle:
    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.model = CLIPModel.from_pretrained(folder).eval()
        self.tokenizer, self.pixels = tokenizer, CLIPImageProcessorPil.from_pretrained(folder)

    def text(self, caption: str) -> torch.Tensor:
        ids = [*self.tokenizer("A photo depicts " + caption)["input_ids"][:23], self.tokenizer.eos_token_id]
        with torch.no_grad():
            return self.model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0].double()

    def near(self, caption: str, picture: Path) -> float:
        pixels = self.pixels(Image.open(picture), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = self.model.get_image_features(pixel_values=pixels).pooler_output[0].double()
        return 2.5 * max(float(torch.cosine_similarity(self.text(caption), seen, 0)), 0)

    def alike(self, caption: str, references: list[str]) -> float:
        mine = self.text(caption)
        return max(max(float(torch.cosine_similarity(mine, self.text(other), 0)) for other in references), 0)


def test_scores_equal_those_of_one_pair_at_a_time(
    clip: Path, files: tuple[Path, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--images is for --clip" in score(capsys, "coco-caption", *files, "--images", clip)[2]
    code, out, err = score(capsys, "coco-caption", *files, "--clip", clip, "--json")
    assert code == 0, err
    told = json.loads(out)["metrics"]
    oracle = Oracle(clip, tiny_tokenizer)
    folder = files[1].parent / "val2014"
    near = [oracle.near(text, folder / f"{n}.png") for n, text in SAID.items()]
    alike = [oracle.alike(text, CAPTIONS[n]) for n, text in SAID.items()]
    assert len(set(near)) > 1
    assert told["clipscore"] == pytest.approx(np.mean(near), abs=1e-5)
    both = [2 * a * b / (a + b) if a + b else 0 for a, b in zip(near, alike, strict=True)]
    assert told["refclipscore"] == pytest.approx(np.mean(both), abs=1e-5)
    _, without, _ = score(capsys, "coco-caption", *files, "--json")
    assert set(told) - set(json.loads(without)["metrics"]) == {"clipscore", "refclipscore"}


def test_below_zero_is_zero_and_what_failed_is_zero(clip: Path, files: tuple[Path, Path]) -> None:
    from data.benchmarks.clipscore import Clip, clipscores

    pictures = [files[1].parent / f"val2014/{n}.png" for n in CAPTIONS]
    found = Clip(str(clip))
    near = found.of_pictures(pictures) @ found.of_captions(["a dog", "cars", "men", "two", "x"]).T
    assert np.linalg.norm(found.of_pictures(pictures), axis=1) == pytest.approx([1, 1, 1])
    assert near.shape == (3, 5)
    found.of_pictures = lambda pictures: -found.of_captions(["a dog"] * len(pictures))  # type: ignore[method-assign]
    measures = clipscores(found, ["a dog", None, "a dog"], pictures, [["a dog"], ["cars"], ["cars"]])
    assert float(measures["clipscore"]) == float(measures["refclipscore"]) == 0
    found.of_pictures = lambda pictures: found.of_captions(["a dog"] * len(pictures))  # type: ignore[method-assign]
    measures = clipscores(found, ["a dog", None, "a dog"], pictures, [["a dog"], ["a dog"], ["cars", "a dog"]])
    assert list(measures["clipscore"].statistics[:, 0]) == pytest.approx([2.5, 0, 2.5])
    assert list(measures["refclipscore"].statistics[:, 0]) == pytest.approx([5 / 3.5, 0, 5 / 3.5])


def test_what_is_missing_is_named(
    clip: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for options, complaint in (
        (["--clip", clip, "--images", tmp_path / "empty"], "those of 3 images aren't there (1, 2, 3)"),
        (["--clip", tmp_path / "nothing"], "nothing: no such model folder"),
        (["--clip", tmp_path / "empty"], "no config.json"),
    ):
        code, out, err = score(capsys, "coco-caption", *files, *options)
        assert (code, out) == (1, "")
        assert complaint in err.splitlines()[-1]
    (tmp_path / "val2014/2.png").unlink()
    _, _, err = score(capsys, "coco-caption", *files, "--clip", clip)
    assert "those of 1 images aren't there (2)" in err
    _, _, err = score(capsys, "exact", *files, "--clip", clip)
    assert "--clip is for captions" in err


def test_without_a_clip_nothing_imports_torch(files: tuple[Path, Path]) -> None:
    code = (
        "import sys\nfrom vlm.cli import main\nfrom data.benchmarks import java\njava.missing = lambda: 'no'\n"
        f"assert main(['score', 'coco-caption', {str(files[0])!r}, {str(files[1])!r}]) == 0\n"
        "sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
