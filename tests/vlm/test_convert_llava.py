"""Import and export of transformers' LLaVA: the same tensors, the same logits, and one sentence for what is broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.vlm.chats import picture, user
from tests.vlm.llavas import LAYOUTS, PATCH, PINPOINTS, SIZE, TEXT, VISION, edit, make_llava, relayout
from vlm import UserError, VisionLanguageConfig, VisionLanguageModel, load, save
from vlm.cli import main
from vlm.convert import exporting, tensors
from vlm.convert.exporting import export_model
from vlm.convert.importing import import_model
from vlm.convert.llava import write_config
from vlm.convert.tensors import SafetensorsFiles, weight_files
from vlm.processing import make_processor

PICTURES = [picture(1, 50, 40), picture(2, 20, 90)]
CHAT = user(None, "what is this?", None, "and this?")


def silent(*_: int) -> None:
    pass


def take(source: Path | str, out: Path, **options: Any) -> Path:
    import_model(str(source), out, silent, **options)
    return out


def give(model: Path, out: Path, to: str = "llava-hf") -> Path:
    export_model(str(model), to, out, silent)
    return out


def held(folder: Path) -> dict[str, torch.Tensor]:
    files = SafetensorsFiles(weight_files(folder))
    return {name: files.read(name) for name in files.shapes}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def theirs(folder: Path) -> torch.Tensor:
    """Logits that transformers' own classes give for the pictures and the chat."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    inputs = processor(text=text, images=PICTURES, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


def ours(folder: Path) -> torch.Tensor:
    model, processor = load(folder)
    ids = processor.chat.encode(CHAT, processor.placeholders(PICTURES), add_generation_prompt=True).input_ids
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), **processor.pixels(PICTURES)).logits
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_and_the_logits_of_transformers(
    llava: Path, copied: Path, tmp_path: Path, layout: str
) -> None:
    expected = held(take(llava, tmp_path / "a"))
    relayout(copied, layout)
    imported = take(copied, tmp_path / "b")
    assert_equal(held(imported), expected)
    assert set(load(imported)[0].state_dict()) == set(expected)  # and these are all
    torch.testing.assert_close(ours(imported), theirs(llava), rtol=0, atol=1e-5)


@pytest.mark.parametrize("indexed", [False, True])
def test_other_files_beside_the_weights_are_no_part_of_them(
    llava: Path, copied: Path, tmp_path: Path, indexed: bool
) -> None:
    weights = copied / "model.safetensors"
    shutil.copy(weights, copied / "model.fp16.safetensors")
    save_file({"x": torch.zeros(2)}, copied / "training_args.safetensors")
    names = dict.fromkeys(load_file(weights), "model-00001-of-00001.safetensors")
    if indexed:
        weights.rename(copied / "model-00001-of-00001.safetensors")
    else:  # left by another version: transformers reads the one file
        names = {"gone": "model-00001-of-00002.safetensors"}
    (copied / tensors.INDEX).write_text(json.dumps({"weight_map": names}))
    assert_equal(held(take(copied, tmp_path / "out")), held(take(llava, tmp_path / "expected")))


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"text": {"tie_word_embeddings": True}},
    "tiles": {"anyres": True},
    "all vectors of two layers, Qwen3": {
        "text": {"model_type": "qwen3", "head_dim": 16},
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-1, 0],
    },
    "SigLIP, no bias, another activation": {
        "vision": {"model_type": "siglip_vision_model"},
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "relu",
    },
    "DINOv2, GPT-NeoX": {
        "vision": {"model_type": "dinov2", "mlp_ratio": 2},
        "text": {"model_type": "gpt_neox", "num_key_value_heads": None},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_export_import_is_the_identity(tiny_tokenizer: Any, tmp_path: Path, variant: str) -> None:
    source = make_llava(tmp_path / "llava", tiny_tokenizer, **VARIANTS[variant])
    imported = take(source, tmp_path / "imported")
    torch.testing.assert_close(ours(imported), theirs(source), rtol=0, atol=1e-5)
    exported = give(imported, tmp_path / "exported")
    torch.testing.assert_close(theirs(exported), theirs(source), rtol=0, atol=0)
    again = take(exported, tmp_path / "again")
    assert_equal(held(again), held(imported))
    for name in ("config.json", "processor_config.json", "generation_config.json", "chat_template.jinja"):
        assert (again / name).read_text() == (imported / name).read_text()
    parts = {"vision_tower", "multi_modal_projector", "language_model"}
    parts |= {"image_newline"} if VARIANTS[variant].get("anyres") else set()
    assert {name.split(".")[0] for name in held(exported)} == parts


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_tying_is_read_where_any_version_writes_it(tiny_tokenizer: Any, tmp_path: Path, where: str) -> None:
    source = make_llava(tmp_path / "llava", tiny_tokenizer, text={"tie_word_embeddings": True})
    config = json.loads((source / "config.json").read_text())
    del (config if where == "text_config" else config["text_config"])["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    model, _ = load(take(source, tmp_path / "imported"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.usefixtures("bf16_attention")
def test_number_formats_and_shards_survive(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = {
        name: tensor if name.startswith("multi_modal_projector") else tensor.to(torch.bfloat16)
        for name, tensor in load_file(copied / "model.safetensors").items()
    }
    save_file(mixed, copied / "model.safetensors", metadata={"format": "pt"})
    edit(copied / "config.json", dtype="bfloat16")
    monkeypatch.setattr(tensors.write_tensors, "__defaults__", (60_000,))
    told: list[tuple[int, ...]] = []
    import_model(str(copied), tmp_path / "imported", lambda *numbers: told.append(numbers))
    shards = weight_files(tmp_path / "imported")
    assert len(shards) > 2
    size = sum(tensor.nbytes for tensor in mixed.values())
    assert [numbers[:2] for numbers in told] == [(n + 1, len(shards)) for n in range(len(shards))]
    assert told[-1][2] == size
    imported = held(tmp_path / "imported")
    assert {str(tensor.dtype) for tensor in imported.values()} == {"torch.bfloat16", "torch.float32"}
    exported = give(tmp_path / "imported", tmp_path / "exported")
    assert len(weight_files(exported)) == len(shards)
    assert_equal(held(take(exported, tmp_path / "again")), imported)
    assert next(load(tmp_path / "imported")[0].parameters()).dtype == torch.bfloat16


def test_an_exported_folder_is_spelt_so_that_others_read_it(llava: Path, tmp_path: Path) -> None:
    exported = give(take(llava, tmp_path / "imported"), tmp_path / "exported")
    names = set(held(exported))
    for name in (
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    ):
        assert name in names
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_seq_length"] == (SIZE // PATCH) ** 2
    assert config["text_config"]["rope_theta"] == 500000.0  # transformers 4.x reads no rope_parameters
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor"
    assert images["image_mean"] == [0.4, 0.5, 0.6]
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    template = json.loads((exported / "chat_template.json").read_text())["chat_template"]
    assert template == (exported / "chat_template.jinja").read_text()
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "Nothing is recorded here about how this model was trained." in card


def test_nothing_is_replaced(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for command in (take, give):
        with pytest.raises(UserError, match="not empty; use another --out"):
            command(llava, tmp_path)


def test_a_template_of_ones_own_is_taken(copied: Path, tmp_path: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    imported = take(copied, tmp_path / "imported", chat_template=tmp_path / "mine.jinja")
    assert load(imported)[1].chat_template.endswith(template)
    with pytest.raises(UserError, match=r"none.jinja: cannot be read"):
        take(copied, tmp_path / "other", chat_template=tmp_path / "none.jinja")
    for text, complaint in ((" ", "the chat template is empty"), ("{{ a", "the chat template can't render a message")):
        (tmp_path / "mine.jinja").write_text(text)
        with pytest.raises(UserError, match=f"mine.jinja: {complaint}"):
            take(copied, tmp_path / "other", chat_template=tmp_path / "mine.jinja")


@pytest.mark.parametrize(
    ("fusion", "connector", "complaint"),
    [
        ("deep", "mlp", "can't express deep fusion; use --to vlm"),
        ("early", "perceiver", "can't express a perceiver connector; use --to vlm"),
        ("deep", "perceiver", "can't express deep fusion and a perceiver connector; use --to vlm"),
    ],
)
def test_what_llava_cant_express_goes_out_in_our_own_layout(
    tiny_models: Callable[[str, str], Path], tmp_path: Path, fusion: str, connector: str, complaint: str
) -> None:
    source = tiny_models(fusion, connector)
    with pytest.raises(UserError, match=complaint):
        give(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    exported = give(source, tmp_path / "out", to="vlm")
    assert_equal(held(exported), held(source))
    torch.testing.assert_close(ours(exported), ours(source), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "dinov2"])
def test_tiles_of_any_encoder_go_out_and_in(tiny_tokenizer: Any, tmp_path: Path, kind: str) -> None:
    config = VisionLanguageConfig(
        vision_config={**VISION, "model_type": kind},
        text_config={**TEXT, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None},
        tiling={"mode": "anyres", "pinpoints": PINPOINTS},
        image_token_id=tiny_tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    save(VisionLanguageModel(config), make_processor(config, tiny_tokenizer), tmp_path / "model")
    exported = give(tmp_path / "model", tmp_path / "exported")
    torch.testing.assert_close(theirs(exported), ours(tmp_path / "model"), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(take(exported, tmp_path / "again")), ours(tmp_path / "model"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"connector": {"depth": 3}}, "a projector of 3 layers"),
        ({"connector": {"pool": 2}}, "pooled patches"),
        ({"second_vision_config": VISION}, "a second vision encoder"),
        ({"tiling": {"mode": "tiles"}}, "tiling mode tiles"),
        ({"vision_config": {**VISION, "model_type": "dinov2_with_registers"}}, "an encoder with 5 vectors before"),
        ({"vision_config": {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16}}, "NaFlex encoder"),
    ],
    ids=str,
)
def test_more_that_llava_cant_express(settings: dict[str, Any], complaint: str) -> None:
    config = VisionLanguageConfig(**{"vision_config": VISION, "text_config": TEXT, **settings})
    with pytest.raises(UserError, match=f"can't express .*{complaint}.*; use --to vlm"):
        write_config(config)


def test_a_copy_that_answers_differently_is_not_kept(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = take(llava, tmp_path / "imported")
    write = exporting.write_tensors

    def wrong(folder: Path, source: Any, progress: Any) -> None:
        write(folder, source, progress)
        name = "multi_modal_projector.linear_1.weight"
        written = load_file(folder / "model.safetensors")
        save_file({**written, name: torch.zeros(32, 32)}, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "write_tensors", wrong)
    assert main(["export", str(imported), "--to", "llava-hf", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "doesn't answer as its source does: logits differ by" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported"]


def test_what_export_says(llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(llava), "--out", str(tmp_path / "imported")]) == 0
    assert main(["export", str(tmp_path / "imported"), "--to", "llava-hf", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "largest difference of logits to the source: 0 (up to" in said.out
    assert "importing: shard 1 of 1" in said.err
