"""Recipes and run folders: what is wrong is named, and nothing is half-written."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.bad import Bad
from tests.train.recipes import chat_recipe, with_contrastive_stage, write_recipe
from train.build import build_clip
from train.recipe import Recipe, load_recipe
from train.runs import Run
from vlm.cli import main
from vlm.errors import UserError
from vlm.settings import dump, parse
from vlm.tokenization import train_tokenizer


def test_a_typo_is_answered_with_its_path_and_the_nearest_name(scenes: Path, tmp_path: Path) -> None:
    settings = chat_recipe(scenes)
    settings["stages"][0]["batchsize"] = 4
    with pytest.raises(UserError, match=r"stages\.0\.batchsize: unknown setting; did you mean 'batch_size'"):
        load_recipe(write_recipe(tmp_path / "r.yaml", settings))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.chat.learning_rates.conector=1e-3", "did you mean 'connector'"),
        ("stages.chat.steps=0", r"stages\.0\.steps: 1 or more is needed \(got 0\)"),
        ("stages.chat.steps=many", "stages.0.steps"),
        ("stages.tune.steps=3", "no entry 'tune'"),
        ("stages.chat.learning_rates.lora=1e-3", "lora settings and a learning rate for lora go together"),
        ("stages.chat.reset=[q_proj] stages.chat.learning_rates.language_model=0", "reset is for chat stages"),
        ("stages.chat.micro_batch_size=3", "doesn't divide"),
        ("model.vision.stage=clip", "no stage 'clip'"),
        ("model.connector.depth=0", r"model\.connector\.depth: 1 or more"),
        ("model.connector.activation=gellu", "activation 'gellu' is unknown; did you mean 'gelu'"),
        ("model.feature_layer=[]", "feature_layer needs at least one layer"),
        ("model.pretrained=runs/demo/model", "brings its own vision, language, tokenizer_vocab"),
        ("data_root=nowhere", "is no folder"),
        ("model.vision", "write it as"),
    ],
)
def test_what_can_not_work_is_refused_with_its_place(scenes: Path, tmp_path: Path, override: str, message: str) -> None:
    settings = chat_recipe(scenes)
    del settings["model"]["vision"]["config"]
    settings["model"]["vision"]["pretrained"] = "somewhere"
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(tmp_path / "r.yaml", settings), override.split())


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint_every=0",
        "keep_checkpoints=0",
        "seed=-1",
        "seed=5000000",
        "workers=-1",
        "image_cache_mb=-1",
        "threads=0",
        "threads=-1",
        "context=0",
        "context=-5",
        "model.tokenizer_vocab=261",
        "model.projection_dim=0",
        "model.connector.position_std=-1",
        "model.connector.position_std=.nan",
        "model.cross_attention.every=0",
        "stages.0.group=0",
        "stages.0.micro_batch_size=0",
        "stages.0.micro_batch_size=-2",
        "stages.0.learning_rates.connector=.nan",
        "stages.0.learning_rates.connector=.inf",
        "stages.0.learning_rates.connector=-1",
        "stages.0.lora.rank=0",
        "stages.0.lora.alpha=0",
        "stages.0.lora.dropout=2",
        "stages.0.betas=[0.9,2]",
        "stages.0.warmup=7",
        "stages.0.warmup=-0.1",
        "stages.0.clip=0",
        "stages.0.clip=.nan",
        "stages.0.weight_decay=-1",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_path(scenes: Path, tmp_path: Path, override: str) -> None:
    settings = chat_recipe(scenes, lora={"rank": 2}, learning_rates={"connector": 1e-3, "lora": 1e-3})
    path = override.partition("=")[0].replace(".", r"\.")
    needed = r"(.* or more|more than .*|.* or less|less than .*|a finite number) is needed \(got [^;]*$"
    with pytest.raises(UserError, match=rf": {path}(\.1)?: {needed}"):
        load_recipe(write_recipe(tmp_path / "r.yaml", settings), [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.0.steps=many", "stages.0.steps: a whole number is needed (got 'many')"),
        ("stages.0.steps=1.5", "stages.0.steps: a whole number is needed (got 1.5)"),
        ("stages.0.shuffle=maybe", "stages.0.shuffle: true or false is needed (got 'maybe')"),
        ("stages.0.objective=hot", "stages.0.objective: 'contrastive', 'language' or 'chat' is needed (got 'hot')"),
        ("stages.0.clip=-1", "stages.0.clip: more than 0 is needed (got -1)"),
        ("stages.0.data=x", "stages.0.data: a list is needed (got 'x')"),
        ("stages.0.data=[x]", "stages.0.data.0: a mapping {name: value} is needed (got 'x')"),
        ("stages.0.data=[{}]", "stages.0.data.0.path: required, and missing"),
        ("model.connector=mlp", "model.connector: a mapping {name: value} is needed (got 'mlp')"),
        ("model.feature_layer=x", "model.feature_layer: a whole number or a list is needed (got 'x')"),
        ("model.feature_layer=[a]", "model.feature_layer.0: a whole number is needed (got 'a')"),
        ("stages.0.betas=[.1,.2,.3]", "stages.0.betas: a list of at most 2 is needed (got a list of 3)"),
        ("max_bad=few", "max_bad: a share such as 0.005 or 0.5% is needed (got 'few')"),
        ("seed=1e30", "seed: a whole number with fewer digits is needed (got 1e+30)"),
        ("data_root={a: b}", "data_root: a text is needed (got a mapping)"),
        ("stages.0.data.0.columns={image: [1]}", "stages.0.data.0.columns.image.0: a text is needed (got 1)"),
        ("stages.0.data.0.columns={imag: x}", "nothing is read by the name 'imag'; did you mean 'image'?"),
    ],
)
def test_what_is_needed_is_said_in_plain_words(scenes: Path, tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        load_recipe(write_recipe(tmp_path / "r.yaml", chat_recipe(scenes)), [override])
    words = (
        "nput should",
        "ield required",
        "xtra inputs",
        "type=",
        "instance of",
        "valid dictionary",
        "unable to parse",
    )
    assert not [word for word in words if word in str(error.value)]


def test_steps_beside_epochs_name_both_and_the_override_that_clears_one(scenes: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, steps=200))
    with pytest.raises(UserError, match=r"has both steps \(200\) and epochs \(3\), .* stages\.chat\.steps=null or"):
        load_recipe(recipe, ["stages.chat.epochs=3"])
    cleared = load_recipe(recipe, ["stages.chat.epochs=3", "stages.chat.steps=null"]).stages[0]
    assert (cleared.steps, cleared.epochs) == (None, 3)


def test_a_stored_recipe_reads_back_equal(scenes: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", chat_recipe(scenes)), ["stages.chat.clip=0.5"])
    assert recipe.stages[0].clip == 0.5
    assert parse(Recipe, yaml.safe_load(dump(recipe)), "dump") == recipe


def test_a_folder_is_claimed_by_one_recipe(scenes: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", chat_recipe(scenes)))
    other = load_recipe(tmp_path / "r.yaml", ["seed=1"])
    Run(tmp_path / "run").claim(recipe, resume=False)
    with pytest.raises(UserError, match="--resume"):
        Run(tmp_path / "run").claim(recipe, resume=False)
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        Run(tmp_path / "run").claim(other, resume=True)
    Run(tmp_path / "run").claim(recipe, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        Run(tmp_path / "full").claim(recipe, resume=False)


def test_lines_after_the_restored_step_and_half_written_ones_go(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    left_out = '{"where": "a:1", "reason": "odd", "stage": "s", "step": 2}\n'
    run.quarantine_file.write_text(left_out + left_out.replace("2", "3") + left_out[:9])
    run.forget_after(2)
    assert run.metrics_file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert run.quarantine_file.read_text() == left_out
    assert run.quarantined("s") == [Bad("a:1", "odd")]
    assert run.quarantined("another") == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"image": "gone.png", "question": "q", "answer": "a"}\n', "rows.jsonl:1: image 'gone.png'"),
        ('\n{"messages": [{"role": "assistant", "content": "hi"}]}\n', "rows.jsonl:2: message 1 is from 'assistant'"),
        ('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}\n', "empty answer"),
        ('{"question": "q", "answer": "\\ud800"}\n', "rows.jsonl:1: a text holds half of a surrogate pair"),
        ("", "no rows"),
    ],
)
def test_a_broken_row_stops_the_command_before_anything_is_written(
    scenes: Path, tmp_path: Path, rows: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(tmp_path, data=[{"path": "rows.jsonl"}]))
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("objective", "workers"), [("chat", 0), ("chat", 1), ("contrastive", 0)])
def test_a_broken_image_is_an_error_with_the_row(
    tmp_path: Path, objective: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text('\n{"image": "a.png", "caption": "a cube"}\n')
    settings = {**chat_recipe(tmp_path, data=[{"path": "rows.jsonl"}]), "workers": workers}
    if objective == "contrastive":
        settings = with_contrastive_stage(settings)
    assert main(["train", str(write_recipe(tmp_path / "r.yaml", settings)), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"rows\.jsonl:2: \S+a\.png: not an image of a known format", error)
    assert "Traceback" not in error


def test_a_row_without_image_stops_a_contrastive_stage_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "what?", "answer": "a cube"}\n')
    settings = with_contrastive_stage(chat_recipe(tmp_path, data=[{"path": "rows.jsonl"}]))
    assert main(["train", str(write_recipe(tmp_path / "r.yaml", settings)), "--out", str(tmp_path / "run")]) == 1
    assert "rows.jsonl:1: has 0 images, where the stage takes 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_context_too_short_for_the_image_is_an_error_with_the_row(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes))
    assert main(["train", str(recipe), "context=12", "--out", str(tmp_path / "run")]) == 1
    assert "16 of them for 1 images) don't fit the context of 12" in capsys.readouterr().err


def test_a_folder_that_is_not_a_model_is_an_error(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(scenes), "--task", "exact", "--data", str(scenes / "heldout.jsonl")]
    assert main([*arguments, "--out", str(tmp_path / "eval")]) == 1
    assert "not a model folder (no config.json in it)" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_ctrl_c_leaves_a_run_that_can_be_resumed(scenes: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, steps=400))
    command = [sys.executable, "-P", "-m", "vlm.cli", "train", str(recipe), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume goes on from there" in error
    assert "Traceback" not in error
    done = metrics.read_text().count("\n")
    assert (tmp_path / "run" / "checkpoints" / f"step-{done}").is_dir()


def test_positions_of_a_new_encoder_start_as_wide_as_the_recipe_says(scenes: Path, tmp_path: Path) -> None:
    settings = with_contrastive_stage(chat_recipe(scenes))
    tokenizer = train_tokenizer(["a red circle"], 330, 64)
    for std in (0.02, 0.3):
        settings["model"]["vision_position_std"] = std
        clip = build_clip(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tokenizer)
        drawn = float(clip.vision_model.embeddings.position_embedding.weight.detach().std())
        assert drawn == pytest.approx(std, rel=0.15)
