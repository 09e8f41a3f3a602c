"""Folders of the original LLaVA that are broken or hostile are refused in one sentence; old pickles are read."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vlm.llavas import VISION, edit, make_llava
from tests.vlm.test_convert_llava import held, take
from tests.vlm.test_convert_original import lora_checkpoint, original, split_language_model
from vlm import UserError


@pytest.fixture
def folder(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """An original folder beside its tower, to be changed."""
    twin = make_llava(tmp_path / "twin", tiny_tokenizer)
    source = original(twin, tmp_path / "source", tmp_path / "tower", safetensors=True)
    shutil.rmtree(twin)
    return source


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")


def pickled(content: dict[Any, Any]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def in_whole_numbers(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].int()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def odd_lora(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: lora_checkpoint(folder, folder.parent / "lm", **settings)


def lora_of_elsewhere(folder: Path) -> None:
    lora = lora_checkpoint(folder, folder.parent / "lm")
    torch.save(
        {name.replace("layers.1", "layers.9"): tensor for name, tensor in lora.items()}, folder / "adapter_model.bin"
    )


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle with code": (spoil_pickle, "holds more than tensors, and such a pickle is never loaded"),
    "no pickle": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"nothing")),
        "pytorch_model.bin: ",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in it"),
    "no tower": (lambda f: edit(f / "config.json", mm_vision_tower="/none"), "/none: no such model folder"),
    "a tower of another width": (
        lambda f: edit(f.parent / "tower" / "config.json", vision_config={**VISION, "hidden_size": 16}),
        "of another shape",
    ),
    "another connector": (
        lambda f: edit(f / "config.json", mm_projector_type="cabstract"),
        "'cabstract' is not support",
    ),
    "another merge": (
        lambda f: edit(
            f / "config.json",
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial",
            image_grid_pinpoints=[[32, 64]],
        ),
        "mm_patch_merge_type 'spatial' is not supported; spatial_unpad and flat are",
    ),
    "tiles by another rule": (
        lambda f: edit(f / "config.json", image_aspect_ratio="anyres_max_9", image_grid_pinpoints=[[32, 64]]),
        "image_aspect_ratio 'anyres_max_9' in its config.json is not supported; square, pad, anyres are",
    ),
    "another scaling": (lambda f: edit(f / "config.json", image_aspect_ratio="highres"), "'highres' in its config"),
    "tiles of no sizes": (lambda f: edit(f / "config.json", image_aspect_ratio="anyres"), "image_grid_pinpoints None"),
    "tiles of odd sizes": (
        lambda f: edit(f / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints="[[32], 64"),
        "image_grid_pinpoints '..32., 64' in its config.json is no list of .width, height.",
    ),
    "a layer that is no number": (
        lambda f: edit(f / "config.json", mm_vision_select_layer="x"),
        "mm_vision_select_layer 'x' in its config.json is no number of a layer",
    ),
    "other vectors": (
        lambda f: edit(f / "config.json", mm_vision_select_feature="slicefour_patch"),
        "mm_vision_select_feature 'slicefour_patch' in its config.json is not supported; patch and cls_patch are",
    ),
    "a pickle without names": (pickled({1: torch.zeros(1)}), "pytorch_model.bin: not a mapping of names to tensors"),
    "sparse tensors": (
        pickled({"lm_head.weight": torch.eye(3).to_sparse()}),
        "pytorch_model.bin: lm_head.weight is a sparse tensor",
    ),
    "whole numbers": (
        in_whole_numbers,
        "source: .*model.norm.weight holds int32, and floating-point numbers are",
    ),
    "pooled patches": (lambda f: edit(f / "config.json", mm_spatial_pool_mode="average"), "mm_spatial_pool_mode"),
    "a stride over patches": (lambda f: edit(f / "config.json", mm_spatial_pool_stride=2), "mm_spatial_pool_stride 2"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "awq"}), "quantised .awq."),
    "marks around images": (lambda f: edit(f / "config.json", mm_use_im_start_end=True), "mm_use_im_start_end True"),
    "another adapter": (odd_lora(use_dora=True), "of another kind than plain LoRA .use_dora"),
    "an adapter of elsewhere": (lora_of_elsewhere, "fits no language_model.model.layers.9"),
}


def test_a_base_that_is_no_language_model_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(split_language_model(folder, tmp_path / "lm"), folder / "mm_projector.bin")
    with pytest.raises(UserError, match="tower: a 'clip' model, where a causal language model is needed"):
        take(folder, tmp_path / "out", base=str(tmp_path / "tower"))


def test_pickles_of_early_torch_are_read(folder: Path, tmp_path: Path) -> None:
    whole = held(take(folder, tmp_path / "whole"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert (folder / "pytorch_model.bin").read_bytes()[:2] != b"PK"
    got = held(take(folder, tmp_path / "out"))
    assert got.keys() == whole.keys()
    assert all(torch.equal(got[name], whole[name]) for name in whole)


class Making:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("bare", [False, True])
def test_early_pickles_with_code_are_refused_and_not_run(folder: Path, tmp_path: Path, bare: bool) -> None:
    hostile = {"lm_head.weight": Making(tmp_path / "made")}
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    if bare:
        file.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"pytorch_model.bin: holds more than tensors, and such a pickle is never"):
        take(folder, tmp_path / "out")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused(folder: Path, tmp_path: Path, what: str) -> None:
    change, complaint = BROKEN[what]
    change(folder)
    with pytest.raises(UserError, match=complaint):
        take(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
