"""A copy is held against its source: NaN is no agreement, and an adapter must be in it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.vlm.test_convert_llava import give
from tests.vlm.test_convert_merge import train_lora
from vlm import UserError, load
from vlm.convert import exporting
from vlm.convert.merge import Reading, Source
from vlm.convert.parity import compare
from vlm.convert.tensors import SafetensorsFiles, Tensors, weight_files

ZEROS, NAN = torch.zeros(1, 3, 5), torch.full((1, 3, 5), float("nan"))


@pytest.mark.parametrize(
    ("expected", "got"),
    [([ZEROS, ZEROS], [ZEROS, NAN]), ([ZEROS, NAN], [ZEROS, ZEROS]), ([NAN, ZEROS], [ZEROS, ZEROS])],
    ids=["images of the copy", "images of the source", "text of the source"],
)
def test_nan_in_either_probe_is_no_agreement(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="doesn't answer as its source does"):
        compare(expected, got, torch.float32)


@pytest.mark.parametrize("std", [0.003, 0.006])
def test_an_adapter_that_was_left_out_is_seen_below_what_bfloat16_rounds(
    tiny_models: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, std: float
) -> None:
    model, processor = load(tiny_models("early", "mlp"), dtype=torch.bfloat16)
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    adapter = train_lora(base, tmp_path / "adapter", std=std)
    give(adapter, tmp_path / "right", to="vlm")
    read = exporting.read_source
    asked: list[Reading] = []

    def without(source: Source) -> tuple[Reading, Tensors]:
        asked.append(read(source)[0])
        return asked[0], SafetensorsFiles(weight_files(source.folder))

    monkeypatch.setattr(exporting, "read_source", without)
    with pytest.raises(UserError, match="answers with 0% of what the adapter changes in its base's answers"):
        give(adapter, tmp_path / "wrong", to="vlm")
    assert not (tmp_path / "wrong").exists()
    # nothing else would have seen it
    compare(asked[0].expected, asked[0].base or [], torch.bfloat16)


def test_an_adapter_that_changes_nothing_leaves(tiny_models: Callable[[str, str], Path], tmp_path: Path) -> None:
    give(train_lora(tiny_models("early", "mlp"), tmp_path / "adapter", std=0.0), tmp_path / "out", to="vlm")
