"""A copy is held against its source: NaN is no agreement, and an adapter must be in it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.vlm.llavas import edit
from tests.vlm.test_convert_llava import give, take
from tests.vlm.test_convert_merge import train_lora
from vlm import UserError, VisionLanguageConfig, load
from vlm.convert import exporting
from vlm.convert.merge import Reading, Source
from vlm.convert.parity import compare
from vlm.convert.tensors import InMemory, Joined, Progress, SafetensorsFiles, Tensors, weight_files
from vlm.processing import VisionLanguageProcessor

ZEROS, NAN = torch.zeros(1, 3, 5), torch.full((1, 3, 5), float("nan"))


@pytest.mark.parametrize(
    ("expected", "got"),
    [([ZEROS, ZEROS], [ZEROS, NAN]), ([ZEROS, NAN], [ZEROS, ZEROS]), ([NAN, ZEROS], [ZEROS, ZEROS])],
    ids=["images of the copy", "images of the source", "text of the source"],
)
def test_nan_in_either_probe_is_no_agreement(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="doesn't answer as its source does"):
        compare(expected, got, torch.float32)


@pytest.mark.usefixtures("bf16_attention")
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


def respell_template(folder: Path) -> None:
    for name, text in (("chat_template.jinja", "{{ 'more' }}"), ("chat_template.json", "")):
        template = text + (folder / "chat_template.jinja").read_text()
        (folder / name).write_text(template if name.endswith("jinja") else json.dumps({"chat_template": template}))


def darken(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", image_mean=[0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (respell_template, "transformers' processor makes other tokens of a chat with images"),
        (darken, "transformers' processor prepares images differently"),
    ],
)
def test_a_processor_that_does_otherwise_is_not_kept(
    llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tamper: Callable[[Path], None],
    complaint: str,
) -> None:
    imported = take(llava, tmp_path / "imported")
    write = exporting.write_processor

    def wrong(processor: VisionLanguageProcessor, config: VisionLanguageConfig, folder: Path) -> None:
        write(processor, config, folder)
        tamper(folder)

    monkeypatch.setattr(exporting, "write_processor", wrong)
    with pytest.raises(UserError, match=complaint):
        give(imported, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


def test_a_tensor_that_transformers_has_no_place_for_is_not_kept(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = take(llava, tmp_path / "imported")
    write = exporting.write_tensors

    def more(folder: Path, source: Tensors, progress: Progress) -> None:
        extra = InMemory({"language_model.model.layers.7.extra": torch.zeros(3)})
        write(folder, Joined([source, extra]), progress)

    monkeypatch.setattr(exporting, "write_tensors", more)
    with pytest.raises(UserError, match=r"has no place for, or lacks, .*layers\.7\.extra; use --to vlm"):
        give(imported, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]
