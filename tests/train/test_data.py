"""Whole runs over data as people have it: packed, grouped, mixed, broken, stopped, on two processes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import train.loop
from data.bad import Bad
from data.encode import encode_record
from data.mixture import Mixture
from data.sources import open_source
from tests.train.kills import killed_at
from tests.train.recipes import chat_recipe, with_contrastive_stage, write_recipe
from train.loop import run_training
from train.quarantine import Quarantine
from train.recipe import load_recipe
from train.runs import Run
from train.state import check_position, latest, read_position
from vlm import UserError, load
from vlm.cli import main

ROOT = Path(__file__).resolve().parents[2]
MODES = ["none", "bucket", "pack"]


def entries(run: Run) -> list[dict[str, Any]]:
    """What a run logged, but for times."""
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_second")} for entry in run.metrics()]


def weights(run: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.model / "model.safetensors")


def mixed(scenes: Path, folder: Path, **stage: Any) -> Path:
    """A recipe over two sources, one of them with broken rows."""
    rows = (scenes / "chat.jsonl").read_text().splitlines()[:30]
    rows[3], rows[17] = '{"question": 3}', rows[17].replace(".png", ".jpg")
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "bad.png").write_bytes(b"\x89PNG no picture")
    data = [
        {"path": str(folder / "rows.jsonl"), "images": str(scenes / "images")},
        {"path": "text.jsonl", "rows": 7},
    ]
    settings = chat_recipe(scenes, data=data, **stage)
    return write_recipe(folder / "r.yaml", {**settings, "max_bad": 0.2})


@pytest.mark.parametrize("fusion", ["early", "deep"])
@pytest.mark.parametrize("mode", MODES)
def test_killed_and_resumed_equals_never_killed(scenes: Path, tmp_path: Path, fusion: str, mode: str) -> None:
    path = mixed(scenes, tmp_path, packing={"mode": mode, "tokens": 512, "window": 8}, micro_batch_size=2)
    recipe = load_recipe(path, [f"model.fusion={fusion}", f"stages.chat.steps={12 if mode != 'pack' else 6}"])
    whole = run_training(recipe, tmp_path / "whole")
    with killed_at(5):
        run_training(recipe, tmp_path / "killed")
    resumed = run_training(recipe, tmp_path / "killed", resume=True)
    assert entries(resumed) == entries(whole)
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.quarantine_file.read_text() == whole.quarantine_file.read_text()
    assert {Path(row.where).name for row in whole.quarantined("chat")} == {"rows.jsonl:4", "rows.jsonl:18"}


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_learns_from_every_row_once(scenes: Path, tmp_path: Path, mode: str) -> None:
    path = mixed(scenes, tmp_path, steps=None, epochs=2, packing={"mode": mode, "tokens": 512})
    run = run_training(load_recipe(path), tmp_path / "run")

    _, processor = load(run.model)
    sources = [open_source(tmp_path / "rows.jsonl", scenes / "images"), open_source(scenes / "text.jsonl")]
    mixture = Mixture(sources, 0, [30, 7])
    expected = 0
    for number in range(2 * len(mixture)):
        sample = mixture.sample(number)
        record = mixture.read(sample)
        if isinstance(record, Bad):
            continue
        rng = mixture.generator(sample)
        counts = [processor.image_tokens.placeholders(1, 1)] * len(record.images)
        expected += len(encode_record(record, processor.chat, 512, "assistant", rng, counts).input_ids)
    logged = entries(run)
    assert sum(entry["tokens"] for entry in logged) == expected
    assert len(run.quarantined("chat")) == 2
    rates = [entry["lr"]["connector"] for entry in logged]
    assert rates[0] > rates[-1]
    assert all(0 < entry["fill"] <= 1 for entry in logged)


def test_packing_fills_what_padding_leaves_empty(scenes: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = next((scenes / "images").rglob("*.png")).relative_to(scenes / "images")
    rows = [{"question": "?", "answer": "a cube " * int(count)} for count in rng.integers(1, 40, 80)]
    pictured = [{**row, "image": str(image)} if rng.random() < 0.5 else row for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pictured)))

    def fill(mode: str) -> float:
        data = [{"path": str(tmp_path / "rows.jsonl"), "images": str(scenes / "images")}]
        settings = chat_recipe(scenes, data=data, steps=None, epochs=1, packing={"mode": mode, "tokens": 384})
        run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", settings)), tmp_path / mode)
        logged = entries(run)
        return sum(entry["tokens"] for entry in logged) / sum(entry["tokens"] / entry["fill"] for entry in logged)

    none, bucket, pack = (fill(mode) for mode in MODES)
    assert none < 0.8 < bucket < 1
    assert 0.9 < pack < 1


def test_too_many_broken_rows_stop_the_run_with_a_summary(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (scenes / "captions.jsonl").read_text().splitlines()[:20]]
    for number in (2, 5, 11):
        rows[number]["image"] = "broken.png"
    images = tmp_path / "images"
    shutil.copytree(scenes / "images", images)
    (images / "broken.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {**chat_recipe(tmp_path, data=[{"path": "rows.jsonl"}], steps=8), "checkpoint_every": 1}
    recipe = write_recipe(tmp_path / "r.yaml", settings)
    assert main(["train", str(recipe), "max_bad=5%", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "chat: 2 of 20 rows are broken, more than max_bad (0.05) allows (2 x " in error
    assert "not an image of a known format" in error
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 2
    # the limit decides nothing about what is learned: the run goes on under another one
    again = ["train", str(recipe), "max_bad=0.5", "--out", str(tmp_path / "run"), "--resume"]
    assert main(again) == 0
    error = capsys.readouterr().err
    assert "chat: rows left out: 3 of 20 (3 x " in error
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(line["where"]).name for line in lines) == ["rows.jsonl:12", "rows.jsonl:3", "rows.jsonl:6"]
    assert all(line["reason"] and line["stage"] == "chat" and line["step"] for line in lines)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["max_bad"] == 0.5


@pytest.mark.parametrize("length", [{"steps": 3}, {"steps": None, "epochs": 1}], ids=["steps", "epochs"])
def test_where_no_row_can_be_used_the_run_says_so_and_names_all(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: dict[str, Any]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "what?", "answer": "that"}\n' * 5)
    data = [{"path": str(tmp_path / "rows.jsonl")}, {"path": str(tmp_path / "rows.jsonl"), "rows": 2}]
    recipe = write_recipe(tmp_path / "r.yaml", {**chat_recipe(scenes, data=data, **length), "max_bad": 1.0})
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 1
    assert "chat: none of the 5 rows that it meets can be used (5 x " in capsys.readouterr().err
    assert len(Run(tmp_path / "run").quarantined("chat")) == 5


def too_long(count: int) -> list[dict[str, str]]:
    """Rows that are sound, and that no context takes."""
    return [{"question": "word " * 600, "answer": f"that {number}"} for number in range(count)]


def test_a_stream_of_which_no_row_can_be_used_ends_the_run(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.Table.from_pylist(too_long(100)), tmp_path / "rows.parquet")
    data = [{"path": str(tmp_path / "rows.parquet"), "stream": True}]
    recipe = write_recipe(tmp_path / "r.yaml", {**chat_recipe(scenes, data=data), "max_bad": 1.0})
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 1
    assert "rows that it meets can be used (100 x " in capsys.readouterr().err
    assert len(Run(tmp_path / "run").quarantined("chat")) == 100


def test_ctrl_c_among_broken_rows_stops_and_loses_nothing(scenes: Path, tmp_path: Path) -> None:
    good = [{"question": f"{number}?", "answer": "yes"} for number in range(30)]
    rows = [*good[:10], *too_long(900), *good[10:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [{"path": str(tmp_path / "rows.jsonl")}]
    settings = {**chat_recipe(scenes, data=data, steps=7, shuffle=False), "max_bad": 1.0, "checkpoint_every": 2}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
    whole = run_training(recipe, tmp_path / "whole")
    real = Quarantine.add

    def interrupted(self: Quarantine, *given: Any) -> None:
        if len(self) < 300 <= len(self) + len(given[0]):
            os.kill(os.getpid(), signal.SIGINT)
        real(self, *given)

    with patch.object(Quarantine, "add", interrupted), pytest.raises(train.loop.Stopped, match="stopped after step 3"):
        run_training(recipe, tmp_path / "run")
    position = read_position(tmp_path / "run" / "checkpoints" / "step-3")
    assert 600 <= position.loaders[0]["broken"] < 900
    resumed = run_training(recipe, tmp_path / "run", resume=True)
    assert entries(resumed) == entries(whole)
    assert resumed.quarantine_file.read_text() == whole.quarantine_file.read_text()
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_documents_are_no_captions(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((scenes / "images").rglob("*.png"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"texts": ["see ", None], "images": [None, str(image.name)]}))
    data = [{"path": str(tmp_path / "rows.jsonl"), "images": str(image.parent)}]
    settings = with_contrastive_stage(chat_recipe(scenes, steps=1), data=data)
    assert main(["train", str(write_recipe(tmp_path / "r.yaml", settings)), "--out", str(tmp_path / "run")]) == 1
    assert "rows.jsonl:1: a document, where the stage takes images with captions" in capsys.readouterr().err


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(scenes: Path, tmp_path: Path) -> None:
    def kill(*_: Any) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        time.sleep(5)

    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {**chat_recipe(scenes, steps=3), "workers": 1}))
    with (
        patch.object(train.loop, "optimizer_step", kill),
        pytest.raises(UserError, match=r"a worker that prepares rows has ended .*killed by signal: Killed"),
    ):
        run_training(recipe, tmp_path / "run")


def test_a_checkpoint_of_other_data_or_other_processes_is_refused(scenes: Path, tmp_path: Path) -> None:

    path = mixed(scenes, tmp_path)
    run = run_training(load_recipe(path), tmp_path / "run")
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    position = read_position(checkpoint)
    rows, text = tmp_path / "rows.jsonl", open_source(scenes / "text.jsonl")

    def now() -> Mixture:
        return Mixture([open_source(rows, scenes / "images"), text], 0, [30, 7])

    def check(processes: int) -> None:
        mixture = now()
        check_position(checkpoint, position, processes, mixture, [one.fingerprint() for one in mixture.sources])

    check(1)
    with pytest.raises(UserError, match="written by 1 processes, and this run has 2"):
        check(2)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    with pytest.raises(UserError, match=r"rows.jsonl holds other rows than it did; put the old data back"):
        check(1)
    rows.write_text("\n".join(lines[:29]))
    with pytest.raises(UserError, match=r"rows.jsonl had 30 rows and has 29 now; put the old data back"):
        check(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": {"mode": "pack"}, "shuffle": False}, "packing.mode pack puts rows in another order"),
        ({"packing": {"mode": "bucket"}, "group": 2}, "packing.mode bucket puts rows in another order"),
        ({"steps": None}, "has neither steps nor epochs; give one of them"),
        ({"data": [{"path": "chat.jsonl", "weight": 2, "rows": 3}]}, "give weight or rows, not both"),
        ({"packing": {"mode": "pac"}}, "packing.mode"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    scenes: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, **settings)))


TWO = """
import sys
from pathlib import Path
import torch.distributed
from train.loop import run_training
from train.quarantine import Quarantine
from train.recipe import load_recipe
run_training(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), resume=Path(sys.argv[2]).exists())
assert torch.distributed.get_world_size() == 2
"""


def in_two_processes(recipe: Path, folder: Path) -> Run:
    script = folder.parent / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command += [str(script), str(recipe), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder)


@pytest.mark.slow
def test_two_processes_go_on_where_they_stopped(scenes: Path, tmp_path: Path) -> None:
    rates = {"connector": 2e-3, "lora": 2e-3}  # dropout's masks differ as soon as the ranks' rows differ in length
    path = mixed(scenes, tmp_path, steps=5, learning_rates=rates, lora={"rank": 4, "dropout": 0.2})
    whole = in_two_processes(path, tmp_path / "whole")
    held = torch.load(whole.checkpoints / "step-3" / "state.pt", weights_only=True)["position"]["random"]
    assert not torch.equal(held[0]["cpu"], held[1]["cpu"])
    shutil.copytree(whole.folder, tmp_path / "killed")
    killed = Run(tmp_path / "killed")
    shutil.rmtree(killed.folder / "stages")
    shutil.rmtree(killed.model)
    resumed = in_two_processes(path, killed.folder)
    assert entries(resumed) == entries(whole)
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_learn_what_one_does(scenes: Path, tmp_path: Path, mode: str) -> None:
    path = mixed(scenes, tmp_path, steps=None, epochs=2, packing={"mode": mode, "tokens": 512})
    one = run_training(load_recipe(path), tmp_path / "one")
    two = in_two_processes(path, tmp_path / "two")
    assert sum(entry["tokens"] for entry in entries(two)) == sum(entry["tokens"] for entry in entries(one))
    assert {row.where for row in two.quarantined("chat")} == {row.where for row in one.quarantined("chat")}
    if mode == "none":  # where no row is broken, two ranks take the same rows as one
        first, second = entries(one)[0], entries(two)[0]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("wanted", ["vicuna_v1", "plain", "chatml", "file", "{{ bos_token }}"])
def test_a_recipe_may_bring_its_own_chat_template(scenes: Path, tmp_path: Path, wanted: str) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    settings = chat_recipe(scenes, steps=1)
    settings["model"]["chat_template"] = str(template) if wanted == "file" else wanted
    path = write_recipe(tmp_path / "r.yaml", settings)
    if wanted.startswith("{"):
        with pytest.raises(UserError, match="can't render a message of a user"):
            run_training(load_recipe(path), tmp_path / "run")
        return
    run = run_training(load_recipe(path), tmp_path / "run")
    template.unlink()  # the run's folder has all of it
    assert run_training(load_recipe(run.recipe_file), tmp_path / "again").finished
    _, processor = load(run.model)
    chat = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": [{"type": "text", "text": "a cube"}]},
    ]
    said = processor.tokenizer.decode(processor.chat.encode(chat).input_ids)
    marks = {"vicuna_v1": "USER: what? ASSISTANT: a cube", "chatml": "<|im_start|>user\nwhat?", "file": "[user]what?"}
    assert marks.get(wanted, "a cube") in said


def test_a_contrastive_epoch_may_end_with_broken_rows(scenes: Path, tmp_path: Path) -> None:
    rows = (scenes / "captions.jsonl").read_text().splitlines()[:8]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, *['{"image": "gone.png", "caption": "a"}'] * 3]))
    data = [{"path": str(tmp_path / "rows.jsonl"), "images": str(scenes / "images")}]
    settings = with_contrastive_stage(chat_recipe(scenes, steps=1), data=data, steps=None, epochs=1, shuffle=False)
    run = run_training(load_recipe(write_recipe(tmp_path / "r.yaml", {**settings, "max_bad": 0.5})), tmp_path / "run")
    assert [entry["supervised"] for entry in entries(run) if entry["stage"] == "clip"] == [4, 4]
    assert len(run.quarantined("clip")) == 3


def test_a_run_on_a_stream_goes_on_where_it_stopped(scenes: Path, tmp_path: Path) -> None:
    names = sorted((scenes / "images").rglob("*.png"))[:40]
    rows = {
        "question": ["what is it?"] * 40,
        "answer": ["" if n == 7 else f"thing {n}" for n in range(40)],
        "image": [{"bytes": name.read_bytes(), "path": None} for name in names],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    data = [{"path": str(tmp_path / "rows.parquet"), "stream": True, "rows": 12}, {"path": "text.jsonl"}]
    settings = chat_recipe(scenes, data=data, steps=20, packing={"mode": "pack", "tokens": 200})
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", settings))
    whole = run_training(recipe, tmp_path / "whole")
    with killed_at(11):
        run_training(recipe, tmp_path / "killed")
    assert entries(run_training(recipe, tmp_path / "killed", resume=True)) == entries(whole)
    assert [row.where for row in whole.quarantined("chat")] == [f"{tmp_path / 'rows.parquet'}[7]"]


def test_a_stream_among_others_must_say_how_many_rows_it_gives(scenes: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["?"], "answer": ["a"]}), tmp_path / "rows.parquet")
    stream = {"path": str(tmp_path / "rows.parquet"), "stream": True}
    for settings in ({"data": [stream, {"path": "text.jsonl"}]}, {"data": [stream], "steps": None, "epochs": 1}):
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, **settings)))
        with pytest.raises(UserError, match="a stream doesn't say how long it is; give `rows`"):
            run_training(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
