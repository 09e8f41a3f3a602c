"""Saved encoders and language models of transformers, put together by a recipe and trained."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from serve.torch_engine import find_eos_ids
from tests.train.recipes import chat_recipe, write_recipe
from train.loop import run_training
from train.parts import manifest, split_into_parts
from train.recipe import load_recipe
from vlm import UserError, load
from vlm.cli import main
from vlm.images import read_image

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN = [0.1, 0.2, 0.3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Folders as transformers writes them: a whole SigLIP, a DINOv2 and a Qwen3, all with their preprocessing."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    eyes = {**TOWER, "image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(vision_config=eyes, text_config={**TOWER, "vocab_size": 50})).save_pretrained(
        folder / "siglip"
    )
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN).save_pretrained(folder / "siglip")
    Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8)
    ).save_pretrained(folder / "dinov2")
    BitImageProcessorPil(crop_size={"height": 28, "width": 28}, image_mean=MEAN).save_pretrained(folder / "dinov2")
    words = {**TOWER, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}
    ids = {"bos_token_id": None, "eos_token_id": tiny_tokenizer.eos_token_id}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tiny_tokenizer), **words, **ids)).save_pretrained(folder / "qwen3")
    tiny_tokenizer.save_pretrained(folder / "qwen3")
    return folder


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def composed(scenes: Path, saved: Path, fusion: str, **model: Any) -> dict[str, Any]:
    settings = chat_recipe(scenes, fusion, steps=2)
    settings["model"] |= {
        "vision": {"pretrained": str(saved / "siglip")},
        "language": {"pretrained": str(saved / "qwen3")},
        **model,
    }
    return settings


@pytest.mark.parametrize(
    ("fusion", "model"),
    [
        ("early", {}),
        ("early", {"tiling": {"mode": "anyres"}, "connector": {"type": "mlp", "pool": 2, "pooling": "concat"}}),
        ("deep", {"tiling": {"mode": "tiles"}, "second_vision": {"pretrained": "dinov2"}, "second_feature_layer": -1}),
    ],
    ids=["plain", "anyres", "two encoders and tiles"],
)
def test_saved_parts_are_put_together_and_learn(
    scenes: Path, saved: Path, tmp_path: Path, fusion: str, model: dict[str, Any]
) -> None:
    if "second_vision" in model:
        model = {**model, "second_vision": {"pretrained": str(saved / "dinov2")}}
    recipe = write_recipe(tmp_path / "r.yaml", composed(scenes, saved, fusion, **model))
    run = run_training(load_recipe(recipe), tmp_path / "run")
    trained, processor = load(run.model)
    stored = {name: AutoModel.from_pretrained(saved / name) for name in ("siglip", "dinov2")}
    towers = [(trained.vision_tower, stored["siglip"].vision_model), (trained.second_vision_tower, stored["dinov2"])]
    for tower, alone in towers:
        if tower is not None:
            weights = tower.encoder.state_dict()
            assert weights.keys() == alone.state_dict().keys()
            assert all(torch.equal(weights[key], tensor) for key, tensor in alone.state_dict().items())
    learned = {part: rate for part, _, rate in manifest(split_into_parts(trained, load_recipe(recipe).stages[0]))}
    assert {part for part, rate in learned.items() if rate == 0} == {"vision_tower"}
    assert all(list(kind.image_mean) == MEAN for kind in processor.image_processors.values())
    assert (trained.second_vision_tower is not None) == ("second_pixel_values" in processor.image_processors)
    pictures = [read_image(path) for path in sorted((scenes / "images").rglob("*.png"))[:2]]
    pictures[1] = pictures[1].resize((90, 40))
    each = processor.placeholders(pictures)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]}
    ids = torch.tensor([processor.chat.encode([message], each, add_generation_prompt=True).input_ids])
    out = trained.generate(ids, **processor.pixels(pictures), max_new_tokens=3, min_new_tokens=3)
    assert out.shape[1] == ids.shape[1] + 3


TEXT_ONLY = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.mark.parametrize("template", [None, TEXT_ONLY], ids=["no template", "a template of text alone"])
def test_a_tokenizer_that_knows_no_images_learns_to_show_them_and_to_end(
    scenes: Path, saved: Path, tmp_path: Path, template: str | None
) -> None:
    folder = copied(saved / "qwen3", tmp_path / "lm")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["what colour is it?"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    settings = composed(scenes, saved, "early", language={"pretrained": str(folder)})
    run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / "run")
    _, processor = load(run.model)
    image, end, pad = processor.image_token_id, processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    assert None not in (image, end, pad)
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    tokens = processor.chat.encode(chat, [16])
    assert tokens.input_ids.count(image) == 16
    learned = [token for token, said in zip(tokens.input_ids, tokens.supervised, strict=True) if said]
    assert processor.tokenizer.decode(learned[:-1]).strip() == "red"
    assert learned[-1] == end
    asked = processor.chat.encode(chat[:1], [16], add_generation_prompt=True).input_ids
    assert tokens.input_ids[: len(asked)] == asked


def test_code_of_a_tokenizer_is_never_run_whoever_says_yes(
    scenes: Path,
    saved: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(saved / "qwen3", tmp_path / "lm")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **TOWER)).save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write_recipe(tmp_path / "r.yaml", composed(scenes, saved, "early", language={"pretrained": str(folder)}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 1
    assert "asks to run code from the folder (auto_map); that is never done" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_every_end_that_the_language_model_knows_or_the_template_teaches_ends_an_answer(
    scenes: Path, saved: Path, tmp_path: Path
) -> None:
    folder = copied(saved / "qwen3", tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own, other, taught = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|system|>", "<|pad|>"))
    template = "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}<|pad|>"
    tokenizer.chat_template = template + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [own, other]}))
    settings = composed(scenes, saved, "early", language={"pretrained": str(folder)})
    run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / "run")
    model, processor = load(run.model)
    assert model.generation_config.eos_token_id == [own, other, taught]
    assert find_eos_ids(model, processor) == {own, other, taught}


def test_a_saved_encoders_preprocessing_is_kept_and_a_broken_one_named(
    scenes: Path, saved: Path, tmp_path: Path
) -> None:
    folder = copied(saved / "dinov2", tmp_path / "eyes")
    own = {"size": {"height": 64, "width": 64}, "do_center_crop": False, "do_normalize": False, "image_mean": MEAN}
    BitImageProcessorPil(**own).save_pretrained(folder)
    settings = composed(scenes, saved, "early", vision={"pretrained": str(folder)})
    path = write_recipe(tmp_path / "r.yaml", settings)
    _, processor = load(run_training(load_recipe(path), tmp_path / "run").model)
    made = processor.image_processor
    assert (made.do_center_crop, made.do_normalize) == (False, False)
    assert (made.size.height, made.size.width) == (48, 48)  # the whole picture, at the encoder's own size
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not valid JSON"):
        run_training(load_recipe(path), tmp_path / "again")


def test_an_untied_language_model_without_its_head_is_refused(
    scenes: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(saved / "qwen3", tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = composed(scenes, saved, "early", language={"pretrained": str(folder)})
    path = write_recipe(tmp_path / "r.yaml", settings)
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 1
    assert f"{folder}: its weights lack 1 tensors, the first is lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parts_that_are_not_there_are_named(scenes: Path, saved: Path, tmp_path: Path) -> None:
    for part in ("vision", "second_vision", "language"):
        settings = composed(scenes, saved, "early", **{part: {"pretrained": "./gone"}})
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
        with pytest.raises(UserError, match=r"\./gone: no such model folder"):
            run_training(recipe, tmp_path / "run")
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in (saved / "siglip").iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[: 3000 if path.suffix == ".safetensors" else None])
    settings = composed(scenes, saved, "early", vision={"pretrained": str(cut)})
    with pytest.raises(UserError, match=f"{cut}: cannot be loaded"):
        run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
