"""What can be known beforehand is said before anything is written, and nothing stands in the corrected run's way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train.loop
from tests.conftest import TinyModels
from tests.train.kills import killed_at
from tests.train.recipes import LANGUAGE, VISION, chat_recipe, write_recipe
from train.build import build_encoder, build_language_model
from train.check import check_processes, check_recipe, check_rows, tell_rows
from train.loop import run_training
from train.recipe import Backbone, load_recipe
from train.runs import Run
from vlm.checkpoint import load, save
from vlm.cli import main
from vlm.errors import UserError
from vlm.settings import find_config

CLIP = {
    "name": "clip",
    "objective": "contrastive",
    "data": [{"path": "captions.jsonl"}],
    "steps": 2,
    "batch_size": 8,
    "learning_rates": {"vision_tower": 1e-3, "text_tower": 1e-3, "projections": 1e-3},
}
TEXT_TOWER = {name: VISION[name] for name in list(VISION)[:4]}


def two_stages(scenes: Path) -> dict[str, Any]:
    """Contrastive training, then a chat stage with LoRA."""
    settings = chat_recipe(scenes, lora={"rank": 2}, learning_rates={"connector": 1e-3, "lora": 1e-3})
    settings["stages"].insert(0, CLIP)
    settings["model"] |= {"vision": {"config": VISION, "stage": "clip"}, "text_tower": TEXT_TOWER}
    return settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.config.hidden_sise=64", "model.vision.config.hidden_sise: .* did you mean 'hidden_size'"),
        ("model.vision.config.model_type=siglip", "config.model_type: no vision encoder is called 'siglip'; known"),
        ("model.text_tower.num_hidden_layer=9", "model.text_tower.num_hidden_layer: .* mean 'num_hidden_layers'"),
        ("model.language.config.num_hidden_layer=9", "model.language.config.num_hidden_layer: .*'num_hidden_layers'"),
        ("model.image.do_resise=false", "model.image: setting 'do_resise' is unknown; did you mean 'do_resize'"),
        ("model.image.crop_size=16", r"model.image: makes pictures of the shape \(3, 16, 16\)"),
        ("model.image.do_center_crop=false", r"model.image: makes pictures of the shape \(3, 32, 48\)"),
        ("model.language.config.model_type=lama", "no language model is called 'lama'; did you mean 'llama'"),
        ("model.language.config.hidden_size=many", "model.language: .*hidden_size"),
        ("model.language.config.num_attention_heads=3", "model.language: "),
        ("model.language.config=null", "model.language needs pretrained or config"),
        ("model.language.config=null model.language.pretrained=./gone", "./gone: no such model folder"),
        ("model.text_tower=null", "needs model.vision.config and model.text_tower"),
        ("model.feature_layer=-9", "model: feature layer -9"),
        ("context=4096", "context: 4096 is more than the 512 tokens"),
        ("stages.chat.lora.targets=[nope]", "stages.chat.lora.targets: the language model has no nope"),
        ("stages.chat.learning_rates.gates=1e-3", "stages.chat.learning_rates.gates: this model has no such part"),
        (
            "stages.chat.reset=[w_proj] stages.chat.learning_rates.language_model=1e-3",
            "stages.chat.reset: the language model has no w_proj",
        ),
        ("model.language.config.vocab_size=100", "model.language.config.vocab_size: 100 is less than the tokenizer's"),
        ("model.text_tower.vocab_size=100", "model.text_tower.vocab_size: 100 is less than the tokenizer's"),
        ("stages.chat.group=1000", "stages.chat.group: 1000 rows can't be neighbours where there are "),
    ],
)
def test_what_can_be_known_is_said_before_the_first_stage(
    scenes: Path, tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", two_stages(scenes)), override.split())
    with pytest.raises(UserError, match=message) as raised:
        run_training(recipe, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["easy_vqa/early", "easy_vqa/deep", "demo/clip", "demo/language", "flickr8k/clip"])
def test_the_recipes_that_come_with_the_toolkit_can_run(name: str) -> None:
    check_recipe(load_recipe(find_config(f"{name}.yaml")))


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5e5},
        {"model_type": "gpt2", "n_positions": 128},
        {"model_type": "qwen2", "attn_implementation": "sdpa"},
    ],
)
def test_what_transformers_knows_by_another_name_is_no_typo(
    scenes: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = chat_recipe(scenes)
    kept = LANGUAGE if "rope_theta" in settings else {}
    recipe["model"]["language"]["config"] = {**kept, **settings}
    check_recipe(load_recipe(write_recipe(tmp_path / "r.yaml", recipe)))


def test_an_encoder_is_no_language_model(
    scenes: Path, tiny_models: TinyModels, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, _ = load(tiny_models("early", "mlp"))
    save(model.language_model, tiny_tokenizer, tmp_path / "words")
    save(model.vision_tower.encoder, tiny_tokenizer, tmp_path / "eyes")
    settings = chat_recipe(scenes)
    for vision, language, message in (
        ("eyes", "words", None),
        ("words", "words", "words: a 'llama' model, where an encoder is needed"),
        ("eyes", "eyes", "eyes: a 'clip_vision_model' model, where a language model is needed"),
    ):
        folders = {"vision": vision, "language": language}
        settings["model"] |= {part: {"pretrained": str(tmp_path / name)} for part, name in folders.items()}
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
        if message is None:
            check_recipe(recipe)
        else:
            with pytest.raises(UserError, match=message):
                check_recipe(recipe)


def test_a_run_without_a_step_leaves_nothing_and_one_with_a_step_stays(scenes: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, steps=2))
    run = tmp_path / "run"
    arguments = ["train", str(path), "--out", str(run), "--debug"]
    with killed_at(step=1):
        main(arguments)
    assert not run.exists()
    with killed_at(step=2):
        main(arguments)
    assert len(Run(run).metrics()) == 1
    assert (run / "recipe.yaml").is_file()


def test_a_resumed_run_that_fails_is_not_removed(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", chat_recipe(scenes)))
    Run(tmp_path / "run").claim(recipe, resume=False)
    monkeypatch.setattr(train.loop, "run_stages", lambda *_: (_ for _ in ()).throw(UserError("enough")))
    with pytest.raises(UserError, match="enough"):
        run_training(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_a_resumed_run_keeps_its_number_of_threads(scenes: Path, tmp_path: Path) -> None:
    settings = chat_recipe(scenes, steps=1)
    del settings["threads"]
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
    assert torch.get_num_threads() == 1
    run = run_training(recipe, tmp_path / "run")
    torch.set_num_threads(2)
    try:
        run_training(recipe, tmp_path / "run", resume=True)
        assert torch.get_num_threads() == 1
        with pytest.raises(UserError, match="threads is 1 there and 2 here"):
            run_training(load_recipe(tmp_path / "r.yaml", ["threads=2"]), tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(1)
    held = run.held()
    assert held is not None
    assert held.threads == 1


def test_processes_must_be_able_to_share_a_batch(scenes: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", two_stages(scenes))
    check_processes(load_recipe(path), 1)
    with pytest.raises(UserError, match=r"stages\.clip: a contrastive batch can't be shared by 2"):
        check_processes(load_recipe(path), 2)
    with pytest.raises(UserError, match=r"stages\.clip\.batch_size: 8 can't be shared by 3"):
        check_processes(load_recipe(path), 3)


class Trap:
    """Unpickled as anything that pickles can hold, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_of_a_pickle_tensors_alone_are_read_and_only_where_there_is_nothing_else(
    tiny_models: TinyModels, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, _ = load(tiny_models("early", "mlp"))
    for part, build in (
        (model.language_model, lambda backbone: build_language_model(backbone, tiny_tokenizer, Run(tmp_path))),
        (model.vision_tower.encoder, lambda backbone: build_encoder(backbone, Run(tmp_path))),
    ):
        folder = tmp_path / type(part).__name__
        save(part, tiny_tokenizer, folder)
        built = build(Backbone(pretrained=str(folder)))
        assert all(torch.equal(one, built.state_dict()[name]) for name, one in part.state_dict().items())
        torch.save(part.state_dict(), folder / "pytorch_model.bin")
        shutil.move(folder / "model.safetensors", folder / "decoy.safetensors")
        with pytest.raises(UserError, match="cannot be loaded"):
            build(Backbone(pretrained=str(folder)))
        (folder / "decoy.safetensors").unlink()
        built = build(Backbone(pretrained=str(folder)))
        assert all(torch.equal(one, built.state_dict()[name]) for name, one in part.state_dict().items())
        torch.save(Trap(tmp_path / "sprung"), folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="cannot be loaded"):
            build(Backbone(pretrained=str(folder)))
        assert not (tmp_path / "sprung").exists()


def test_a_run_says_which_rows_have_no_picture_and_which_columns_are_not_read(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.png")
    shown = {"shot": "1.png", "question": "q", "answer": "a", "id": 1, "source": "s"}
    rows = [shown, {**shown, "source": None}, {"question": "q", "answer": "a"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = chat_recipe(scenes)
    settings["stages"][0]["data"] = [{"path": str(tmp_path / "rows.jsonl")}]
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
    with pytest.raises(UserError, match=r"2 of 3 rows are broken.*the key shot names '1\.png', which isn't read"):
        check_rows(recipe, recipe.stages[0])
    settings["stages"][0]["data"][0]["columns"] = {"image": "shot"}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
    told = check_rows(recipe, recipe.stages[0])
    said = "stage chat: 3 sound rows read first, 1 without a picture; ignored columns: id (2), source (1)"
    assert str(told) == said
    tell_rows(told, aloud=False)
    assert capsys.readouterr().err == ""
    tell_rows(told, aloud=True)
    assert capsys.readouterr().err == said + "\n"
