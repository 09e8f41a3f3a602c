"""The demo, interrupted: its two pretraining processes answer to one Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.demo import Demo
from train.loop import Stopped
from train.runs import Run
from train.state import latest
from vlm.cli import main


def test_an_interrupted_demo_says_to_run_it_again_not_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Demo) -> None:
        raise Stopped("stopped after step 3; --resume goes on from there")

    for name in ("draw_scenes", "pretrain"):
        monkeypatch.setattr(Demo, name, lambda _: None)
    monkeypatch.setattr(Demo, "fuse", stopped)
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err == "vlm demo: interrupted; run it again, and it goes on where it was\n"


@pytest.mark.slow
def test_ctrl_c_while_pretraining_loses_no_step(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-P", "-m", "vlm.cli", "demo", "--quick", "--out", str(out)]
    # as in a terminal: the signal reaches every process of the foreground group, and isn't ignored, as it is by what a
    # script has started in the background
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    runs = {name: Run(out / "runs" / name) for name in ("clip", "language")}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(
        run.metrics_file.is_file() and run.metrics() for run in runs.values()
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; run it again, and it goes on where it was" in error
    unfinished = [run for run in runs.values() if not run.finished]
    assert unfinished
    for run in unfinished:
        checkpoint = latest(run.checkpoints)
        assert checkpoint is not None
        assert checkpoint.name == f"step-{len(run.metrics())}"
