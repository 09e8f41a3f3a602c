"""The loop: the same update however it is split, the same run however often it is killed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from data.encode import IGNORED
from tests.train.kills import killed_at
from tests.train.recipes import LANGUAGE, VISION, chat_recipe, with_contrastive_stage, write_recipe
from train.loop import run_training, set_rates
from train.objectives import summed_cross_entropy
from train.recipe import Stage, load_recipe
from train.state import save_state
from vlm import load, self_test
from vlm.cli import main

SLOW = pytest.mark.slow  # the other of two ways, or the same at another place: the quick tier has one of each


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def train_once(scenes: Path, folder: Path, *overrides: str, **stage: Any) -> Path:
    recipe = write_recipe(folder.with_suffix(".yaml"), chat_recipe(scenes, **stage))
    return run_training(load_recipe(recipe, list(overrides)), folder).folder


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_changes_nothing(scenes: Path, tmp_path: Path, micro: int) -> None:
    whole = train_once(scenes, tmp_path / "whole", steps=3)
    split = train_once(scenes, tmp_path / "split", f"stages.chat.micro_batch_size={micro}", steps=3)
    for one, other in zip(logged(whole), logged(split), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        assert one["supervised"] == other["supervised"]


def test_the_loss_is_the_mean_over_supervised_tokens(scenes: Path) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, IGNORED, 3, 0], [IGNORED, 4, IGNORED, IGNORED, 6]])
    expected = sum(
        -logits[row, t - 1].log_softmax(-1)[labels[row, t]]
        for row in range(2)
        for t in range(1, 5)
        if labels[row, t] != IGNORED
    )
    torch.testing.assert_close(summed_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize(("fusion", "connector"), [("early", "mlp"), ("deep", "perceiver")])
@pytest.mark.parametrize("killed_step", [pytest.param(4, marks=SLOW), 8, pytest.param(11, marks=SLOW)])
def test_killed_and_resumed_equals_never_killed_bit_for_bit(
    scenes: Path, tmp_path: Path, fusion: str, connector: str, killed_step: int
) -> None:
    settings = chat_recipe(
        scenes,
        fusion,
        connector,
        lora={"rank": 4, "dropout": 0.1},
        learning_rates={"connector": 2e-3, "lora": 2e-3},
        augment={"shift": 2, "jitter": 0.2},
    )
    first = {**settings["stages"][0], "name": "align", "lora": None, "learning_rates": {"connector": 1e-3}}
    settings["stages"].insert(0, first)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
    whole = run_training(recipe, tmp_path / "whole")
    with killed_at(killed_step):
        run_training(recipe, tmp_path / "killed")
    torch.manual_seed(99)  # whatever happened in between
    resumed = run_training(recipe, tmp_path / "killed", resume=True)
    one, other = weights(whole.model), weights(resumed.model)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert logged(whole.folder) == logged(resumed.folder)


def test_an_interrupted_checkpoint_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.state import Position, latest

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path, Position(0, 1, 1, [], [], [], []), model, optimizer, keep=2)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, Position(0, 2, 2, [], [], [], []), model, optimizer, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert latest(tmp_path) == tmp_path / "step-1"


def test_rates_warm_up_and_fall_to_zero_with_each_parts_own_peak() -> None:
    stage = Stage("s", "chat", ({"path": "x"},), {"connector": 1.0}, 100, warmup=0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.0, "peak": peak} for peak in (1.0, 10.0)])
    seen = []
    for step in (0, 9, 10, 55, 99):
        set_rates(optimizer, stage, step, 1, 100)
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert high == pytest.approx(10 * low)
        seen.append(low)
    assert seen[:3] == pytest.approx([0.1, 1.0, 1.0])
    assert seen[3] == pytest.approx(0.5)
    assert 0 < seen[4] < 0.001


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_are_cut_are_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    long = "".join(map(str, range(2000)))
    words = ("what is this?", "a cube", "and that?", long)
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words)]
    rows = [{"image": "a.png", "caption": caption} for caption in ("a cube", long)]
    (tmp_path / "clip.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [{"messages": turns[:2]}, {"messages": turns}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    settings = {**chat_recipe(tmp_path, steps=2, batch_size=2, micro_batch_size=1), "context": 300, "workers": workers}
    data = [{"path": "clip.jsonl"}]
    settings = with_contrastive_stage(settings, data=data, batch_size=2)
    alone = {"name": "words", "objective": "language", "learning_rates": {"language_model": 1e-3}}
    settings["stages"].append({**settings["stages"][1], **alone})
    run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / "run")
    cut = {"clip": ["clip.jsonl:2"], "chat": ["chat.jsonl:2"], "words": ["chat.jsonl:2"]}
    for entry in run.metrics():
        assert entry["shortened"] == [str(tmp_path / where) for where in cut[entry["stage"]]]
    said = capsys.readouterr().err
    for stage, (where,) in cut.items():
        line = f"\n{stage}: rows that were too long and lost their end: 1 (the first is {tmp_path / where}; "
        assert said.count(line) == 1


@pytest.mark.parametrize(
    ("fusion", "connector"),
    [
        ("early", "mlp"),
        ("deep", "perceiver"),
        pytest.param("early", "perceiver", marks=SLOW),
        pytest.param("deep", "mlp", marks=SLOW),
    ],
)
def test_eight_examples_are_learned_by_heart(scenes: Path, tmp_path: Path, fusion: str, connector: str) -> None:
    rows = (scenes / "chat.jsonl").read_text().splitlines()[:16:2]
    (tmp_path / "eight.jsonl").write_text("\n".join(rows))
    data = [{"path": str(tmp_path / "eight.jsonl"), "images": str(scenes / "images")}]
    folder = tmp_path / "run"
    recipe = chat_recipe(scenes, fusion, connector, data=data, steps=150, batch_size=8, schedule="constant")
    run_training(load_recipe(write_recipe(tmp_path / "r.yaml", recipe), ["checkpoint_every=1000"]), folder)
    assert logged(folder)[-1]["loss"] < 0.01


def test_a_recipe_goes_from_nothing_to_a_servable_model(scenes: Path, tmp_path: Path) -> None:
    chat = chat_recipe(scenes, "deep", "perceiver", steps=2)
    model = chat["model"] | {"text_tower": {k: VISION[k] for k in list(VISION)[:4]}, "projection_dim": 32}
    backbone = {"vision": {"config": VISION, "stage": "clip"}, "language": {"config": LANGUAGE, "stage": "words"}}
    with_stage = {**chat, "model": {**model, **backbone}}
    with_stage["stages"] = [
        {
            "name": "clip",
            "objective": "contrastive",
            "data": [{"path": "captions.jsonl"}],
            "steps": 2,
            "batch_size": 8,
            "group": 2,
            "learning_rates": {"vision_tower": 1e-3, "text_tower": 1e-3, "projections": 1e-3},
        },
        {
            "name": "words",
            "objective": "language",
            "data": [{"path": "text.jsonl"}],
            "steps": 2,
            "batch_size": 4,
            "train_on": "all",
            "learning_rates": {"language_model": 1e-3},
        },
        *chat["stages"],
    ]
    recipe = write_recipe(tmp_path / "r.yaml", with_stage)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    fused, clip = weights(tmp_path / "run" / "model"), weights(tmp_path / "run" / "stages" / "clip")
    for name in (name for name in clip if name.startswith("vision_model.")):
        assert torch.equal(fused[name.replace("vision_model.", "vision_tower.encoder.", 1)], clip[name])
    evaluated = ["eval", str(tmp_path / "run" / "model"), "--task", "exact"]
    data = ["--data", str(scenes / "heldout.jsonl"), "--out", str(tmp_path / "eval")]
    assert main([*evaluated, *data]) == 0
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert scores["n"] == 12
    score = ["score", "exact", str(tmp_path / "eval" / "predictions.jsonl"), str(scenes / "heldout.jsonl")]
    assert main(score) == 0
    assert "thumbnails/0.jpg" in (tmp_path / "eval" / "report.html").read_text()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") == 3


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate keeps the first one of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision", "bf16_attention")
def test_what_was_trained_in_bf16_is_asked_in_the_format_that_it_is_saved_in(scenes: Path, tmp_path: Path) -> None:
    folder = train_once(scenes, tmp_path / "run", "precision=bf16", steps=2) / "model"
    test, (model, processor) = self_test.read(folder), load(folder)
    assert test is not None
    again = self_test.make(model, processor, processor.pixels)
    assert test.dtype == again.dtype == "float32"
    assert self_test.distance(test.steps, [(step[0][0], dict(step)) for step in again.steps]) < 1e-5
