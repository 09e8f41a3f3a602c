"""Model folders: what goes in comes out, whole or not at all; pickles, code and broken folders are refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer

from tests.vlm.chats import PAIRS, pad_left, picture, user
from tests.vlm.conftest import LoadedModels
from vlm import UserError, VisionLanguageModel, VisionLanguageProcessor, load, save
from vlm.checkpoint import link_folder, merge_adapter, written_aside
from vlm.errors import DiskFullError

TinyModels = Callable[[str, str], Path]
PROMPTS = [user(None, "what is this?"), user("no picture")]


def logits(model: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**pad_left(processor, PROMPTS), **processor.pixels([picture(1)])).logits
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy of a model's folder, to be broken."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_models("early", "mlp"), copy)
    return copy


@pytest.fixture
def adapter(tiny_models: TinyModels, tmp_path: Path) -> tuple[Path, Any]:
    """A folder of LoRA weights that aren't zero, and the model with the adapter still apart."""
    base, _ = load(tiny_models("deep", "perceiver"))
    torch.manual_seed(0)
    targets = r"language_model\..*\.(q_proj|down_proj)"
    lora = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    lora.peft_config["default"].base_model_name_or_path = str(tiny_models("deep", "perceiver"))
    lora.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", lora.eval()


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_saving_and_loading_changes_no_bit(
    loaded_models: LoadedModels, fusion: str, connector: str, tmp_path: Path
) -> None:
    model, processor = loaded_models(fusion, connector)
    save(model, processor, tmp_path / "a" / "model", extra={"README.md": "# a card\n"})
    again, processor_again = load(tmp_path / "a" / "model")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(logits(model, processor), logits(again, processor_again))
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": again.config._name_or_path}
    assert processor_again.chat_template == processor.chat_template
    assert processor_again.image_tokens == model.config.image_tokens
    assert not again.training
    assert (tmp_path / "a" / "model" / "README.md").read_text() == "# a card\n"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_comes_back_as_it_was(loaded_models: LoadedModels, tmp_path: Path, legacy: bool) -> None:
    words = ["<unk>", "<s>", "</s>", "<image>", *sorted({"\u2581", *"USER: what?"})]
    llama = LlamaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], legacy=legacy)
    llama.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model, processor = loaded_models("early", "mlp")
    settings = {"image_tokens": model.config.image_tokens, "chat_template": processor.chat_template}
    save(model, VisionLanguageProcessor(processor.image_processor, llama, **settings), tmp_path / "model")
    _, again = load(tmp_path / "model")
    text = "<s>USER: <image>what?"
    before = llama.convert_ids_to_tokens(llama(text, add_special_tokens=False).input_ids)
    assert again.tokenizer.convert_ids_to_tokens(again.tokenizer(text, add_special_tokens=False).input_ids) == before
    assert ("\u2581" in before[1]) == legacy  # a space in front of each piece, which only the old kind puts there


def test_the_number_format_of_the_files_is_kept_unless_another_is_asked_for(
    loaded_models: LoadedModels, tmp_path: Path
) -> None:
    model, processor = loaded_models("early", "mlp")
    half = VisionLanguageModel(model.config).to(torch.bfloat16)
    save(half, processor, tmp_path / "half")
    assert {p.dtype for p in load(tmp_path / "half")[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "half", dtype=torch.float32)[0].parameters()} == {torch.float32}


def test_a_folder_of_an_adapter_loads_its_base_with_the_adapter_merged(
    adapter: tuple[Path, Any], loaded_models: LoadedModels
) -> None:
    path, apart = adapter
    base, processor = loaded_models("deep", "perceiver")
    merged, _ = load(path)
    saved = load_file(path / "adapter_model.safetensors")
    changed = set()
    for name, weight in merged.state_dict().items():
        expected = base.state_dict()[name]
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in saved:
            a, b = (saved.pop(f"{prefix}.lora_{which}.weight") for which in "AB")
            expected = expected + 6 / 3 * torch.einsum("or,ri->oi", b, a)
            changed.add(name)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    assert saved == {}
    assert len(changed) == 6
    assert all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)
    assert {type(module).__name__ for module in merged.modules()}.isdisjoint({"PeftModel", "Linear4bit", "LoraModel"})
    told = logits(merged, processor)
    torch.testing.assert_close(told, logits(apart, processor), rtol=1e-4, atol=1e-4)
    assert (told - logits(base, processor)).abs().max() > 1e-2


def test_saving_a_model_with_its_adapter_apart_writes_the_adapter_alone(
    adapter: tuple[Path, Any], loaded_models: LoadedModels, tmp_path: Path
) -> None:
    _, apart = adapter
    _, processor = loaded_models("deep", "perceiver")
    save(apart, processor, tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again, _ = load(tmp_path / "saved")
    torch.testing.assert_close(logits(again, processor), logits(apart, processor), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 9), "doesn't fit its base model, or is"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "doesn't name its base model"),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path=str(f)), "is an adapter, too"),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path=f"{f}/none"), "no such model folder"),
        (lambda f: edit(f / "adapter_config.json", target_modules=["nonesuch"]), "doesn't fit its base model"),
    ],
)
def test_broken_adapters_are_refused(
    adapter: tuple[Path, Any], spoil: Callable[[Path], object], complaint: str
) -> None:
    spoil(adapter[0])
    with pytest.raises(UserError, match=complaint):
        load(adapter[0])


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["multi_modal_projector.layers.0.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickles(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_in_half(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "only pickles": (only_pickles, r"only pickled weights \(pytorch_model.bin\), which are never loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors in it"),
    "code of its own": (
        lambda f: edit(f / "config.json", auto_map={"AutoModel": "evil.Model"}),
        "run code from the folder",
    ),
    "code of its own for the language model": (
        lambda f: edit(f / "config.json", text_config={"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}),
        "run code from the folder",
    ),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template in it"),
    "half the weights": (cut_in_half, "the weights are cut off or broken"),
    "no byte of weights": (lambda f: os.truncate(f / "model.safetensors", 0), "the weights are cut off or broken"),
    "one tensor less": (drop_tensor, "lack 1 tensors, the first is multi_modal_projector.layers.0.bias"),
    "another width": (
        lambda f: edit(f / "config.json", connector={"type": "mlp", "depth": 3}),
        "lack 2 tensors, the first is multi_modal_projector.layers.4.bias",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in it"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{,"), "config.json: not valid JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "another kind of model": (
        lambda f: edit(f / "config.json", model_type="llava"),
        "a 'llava' model, where a 'vlm' model is needed",
    ),
    "an unknown fusion": (lambda f: edit(f / "config.json", fusion="late"), "'fusion' expected one of .*got late"),
    "a typo in the connector": (lambda f: edit(f / "config.json", connector={"typ": "mlp"}), "did you mean 'type'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    "no image processor": (lambda f: (f / "processor_config.json").unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_broken_folders_are_refused_with_their_name(folder: Path, spoil: str) -> None:
    change, complaint = SPOILED[spoil]
    change(folder)
    with pytest.raises(UserError, match=complaint) as error:
        load(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json"])
def test_code_that_comes_with_a_tokenizer_or_image_processor_is_never_run(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # nobody is even asked
    witness = folder / "witness"
    code = f"open({str(witness)!r}, 'w')\nfrom transformers import CLIPImageProcessorPil as Evil"
    (folder / "evil.py").write_text(code)
    if file == "tokenizer_config.json":
        edit(folder / file, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    else:
        evil = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
        edit(folder / file, image_processor=evil)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    assert not witness.exists()


def test_a_pickle_beside_good_weights_is_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source, complaint in (
        (tmp_path / "none", "no such model folder"),
        (tmp_path / "file", "a file, where a model folder is needed"),
        (tmp_path, "not a model folder"),
        ("./none/there", "no such model folder"),
    ):
        with pytest.raises(UserError, match=complaint):
            load(source)


def test_a_save_that_fails_in_the_middle_leaves_the_old_folder_whole(
    folder: Path, loaded_models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded_models("early", "perceiver")
    before = tree(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full)  # the weights are written by then
    with pytest.raises(DiskFullError, match=r"model: can't be written \(No space left"):
        save(model, processor, folder)
    assert tree(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_takes_the_place_of_an_older_folder_with_nothing_left_of_it(
    folder: Path, loaded_models: LoadedModels
) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"an old shard")
    model, processor = loaded_models("deep", "mlp")
    save(model, processor, folder)
    assert load(folder)[0].config.fusion == "deep"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("there", [True, False])
def test_through_a_link_its_target_is_written(loaded_models: LoadedModels, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    save(*loaded_models("early", "mlp"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_place_where_nothing_can_be_written_is_named(loaded_models: LoadedModels, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=r"(below|nnn): can't be written \((File exists|File name too long)"):
            save(*loaded_models("early", "mlp"), place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_never_displaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with (
        pytest.raises(UserError, match="notes: a file, where a folder is to be written"),
        written_aside(tmp_path / "notes"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert (tmp_path / "notes").read_text() == "mine"


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.startswith(".model.partial"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), written_aside(target) as partial:
        (partial / "new").write_text("new")
    assert tree(tmp_path) == {"model/old": b"old"}


def test_a_linked_copy_is_equal_and_its_own(folder: Path, tmp_path: Path) -> None:
    link_folder(folder, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(folder)
    shutil.rmtree(folder)
    load(tmp_path / "copy")


def test_merging_refuses_a_folder_without_weights(loaded_models: LoadedModels, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        merge_adapter(loaded_models("early", "mlp")[0], tmp_path)
