"""A disk without room: what was to be written is named, what was there before stays, and the run goes on later.

A limit on the size of files refuses writes as a full disk does, in every library; where a file system of one's own can
be mounted, a really full one is tried, too.
"""

import errno
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train.loop
from tests.train.recipes import chat_recipe, write_recipe
from train.loop import run_training
from train.monitor import told_once
from train.recipe import load_recipe
from train.runs import Run
from train.state import Position, latest, save_state
from vlm.cli import main
from vlm.errors import DiskFullError, UserError, disk_full, room_for


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_from(step: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From this optimizer step on there is room for files of `size` bytes alone."""
    real, calls = train.loop.optimizer_step, 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return real(*args, **kwargs)

    monkeypatch.setattr(train.loop, "optimizer_step", filling)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.undo()


def write_tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(20_000)}, folder / "a.safetensors")


def write_state(folder: Path) -> None:
    with (folder / "state.pt").open("wb") as file:
        torch.save({"a": torch.zeros(20_000)}, file)


def write_text(folder: Path) -> None:
    (folder / "text").write_text("a" * 80_000)


@pytest.mark.parametrize("write", [write_tensors, write_state, write_text])
def test_every_library_is_understood(write: Any, tmp_path: Path) -> None:
    refused = pytest.raises(DiskFullError, match=r"there: can't be written \(File too large\)")
    with files_up_to(4000), refused, room_for("there"):
        write(tmp_path)


def test_other_errors_are_no_full_disks() -> None:
    assert disk_full(OSError(errno.ENOSPC, "x")) is not None
    assert disk_full(PermissionError(errno.EACCES, "x")) is None
    assert disk_full(RuntimeError("No such file (os error 2)")) is None
    for error in (UserError("a row is broken"), KeyError("x"), PermissionError(errno.EACCES, "x")):
        with pytest.raises(type(error)) as caught, room_for("there"):
            raise error
        assert caught.value is error


# metrics.jsonl has a line of 300 bytes or so a step, and a checkpoint is far larger
@pytest.mark.parametrize(
    ("step", "size", "named", "kept"),
    [(5, 1000, "metrics.jsonl", 3), (6, 100_000, "step-6", 3), (2, 100_000, "step-3", None)],
)
def test_a_run_ends_with_the_path_and_goes_on_when_there_is_room(
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    size: int,
    named: str,
    kept: int | None,
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes))
    run = Run(tmp_path / "run")
    with full_from(step, size, monkeypatch):
        assert main(["train", str(recipe), "--out", str(run.folder)]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"vlm train: {run.folder}"), said
    assert f"{named}: can't be written (File too large); make room, and go on with --resume" in said
    assert "Traceback" not in said
    checkpoint = latest(run.checkpoints)
    assert (checkpoint and checkpoint.name) == (f"step-{kept}" if kept else None)
    assert not [path for path in run.folder.rglob("*") if "partial" in path.name]
    assert all(entry["loss"] for entry in run.metrics())  # no half line
    assert main(["train", str(recipe), "--out", str(run.folder), "--resume"]) == 0
    whole = run_training(load_recipe(recipe), tmp_path / "whole")
    assert equal(run.model, whole.model)


def test_a_model_without_room_is_not_begun(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint has half of the numbers that the model has, and room."""
    stage = {"learning_rates": {"connector": 1e-3}}
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes, **stage))
    run = Run(tmp_path / "run")
    with full_from(6, 150_000, monkeypatch):
        assert main(["train", str(recipe), "--out", str(run.folder)]) == 1
    assert "stages/chat: can't be written (File too large); make room" in capsys.readouterr().err
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-3", "step-6"]
    assert not run.model.exists()
    assert not list((run.folder / "stages").iterdir())
    assert main(["train", str(recipe), "--out", str(run.folder), "--resume"]) == 0
    assert run.finished


def test_a_checkpoint_without_room_leaves_the_last_good_one(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path, Position(0, 1, 1, [], [], [], []), model, optimizer, keep=1)
    with files_up_to(1000), pytest.raises(DiskFullError, match="step-2"):
        save_state(tmp_path, Position(0, 2, 2, [], [], [], []), model, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_line_that_has_no_room_is_not_there_by_half(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log({"step": 1, "loss": 0.5})
    before = run.metrics_file.read_bytes()
    with files_up_to(len(before) + 10), pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        run.log({"step": 2, "loss": 0.25})
    assert run.metrics_file.read_bytes() == before


def test_a_thread_that_finds_the_disk_full_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's; whatever else fails in a thread is shown as ever."""
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: shown.append(failed.exc_value))
    others = KeyError("x")
    with told_once():
        for error in (OSError(errno.ENOSPC, "No space left on device"), others):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert shown == [others]


def fail(error: Exception) -> None:
    raise error


def test_an_evaluation_an_export_and_a_report_name_what_they_could_not_write(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["eval", str(model), "--task", "exact", "--data", str(data), "--out", str(tmp_path / "eval")]
    with files_up_to(2000):
        assert main(ask) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"vlm eval: {tmp_path / 'eval'}")
    assert main(ask) == 0
    with files_up_to(2000):
        assert main(["export", str(model), "--to", "vlm", "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'out'}: can't be written (File too large)" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    with files_up_to(2000):
        assert main(["report", str(model.parent)]) == 1
    assert f"{model.parent / 'report.html'}: can't be written (File too large)" in capsys.readouterr().err


def equal(one: Path, other: Path) -> bool:
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    """Down to the last byte."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    file.write(b"0" * size)
    assert shutil.disk_usage(folder).free == 0


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_really_full_disk(
    scenes: Path,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", chat_recipe(scenes))
    run, calls = Run(small_disk / "run"), 0
    real = train.loop.optimizer_step

    def filling(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == step:
            fill(small_disk)
        return real(*args, **kwargs)

    monkeypatch.setattr(train.loop, "optimizer_step", filling)
    assert main(["train", str(recipe), "--out", str(run.folder)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"vlm train: {run.folder}/")
    assert last.endswith("can't be written (No space left on device); make room, and go on with --resume")
    (small_disk / "filler").unlink()
    assert main(["train", str(recipe), "--out", str(run.folder), "--resume"]) == 0
    whole = run_training(load_recipe(recipe), tmp_path / "whole")
    assert equal(run.model, whole.model)
