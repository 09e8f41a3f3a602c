"""Real vLLM on the CPU: a model that answers as when it was saved is served, one that was changed serves nobody."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.serve.helpers import picture
from tests.serve.vllm_models import Case, build
from tests.serve.vllm_server import FLAGS, ROOT, serving, vllm_python
from vlm.checkpoint import read_object
from vlm.self_test import BOUNDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_model_as_it_was_saved_is_served(tmp_path: Path) -> None:
    build(tmp_path / "model", "deep, mlp")
    with serving(tmp_path / "model", tmp_path, "--dtype", "bf16") as server:
        said = re.search(r"self-test: .* are (\S+) apart \(up to (\S+) is rounding", server.log.read_text())
        assert said is not None
        assert float(said[2]) == BOUNDS["bfloat16"]
        assert float(said[1]) < BOUNDS["bfloat16"] / 4, "there is little room for other machines"
        assert len(server.ask([Case("what is it?", (picture(1),))])) == 1


def shut_gates(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if name.endswith("gate")]
    assert names
    for name in names:
        weights[name].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def brighten(folder: Path) -> None:
    path = folder / "processor_config.json"
    settings = read_object(path)
    images = settings["image_processor"]
    images["image_mean"] = [mean + 0.1 for mean in images["image_mean"]]
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "change"), [("deep, mlp", shut_gates), pytest.param("mlp", brighten, marks=pytest.mark.soak)]
)
def test_a_model_that_was_changed_serves_nobody(tmp_path: Path, kind: str, change: Callable[[Path], None]) -> None:
    folder = tmp_path / "model"
    build(folder, kind)
    change(folder)
    code, answered, errors = watched(folder, tmp_path)
    assert code == 1
    assert not answered
    last = errors.rstrip("\n").rsplit("\n", 1)[-1]
    assert re.match(rf"vlm serve: {folder}: the model answers its test question differently .* apart, and", last), (
        errors
    )
    assert "--skip-self-test" in last
    assert 'File "/' not in errors, "a traceback"


def watched(folder: Path, here: Path) -> tuple[int, bool, str]:
    """Runs the server until it ends: its code, whether anybody could connect meanwhile, and its stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "vlm.cli", "serve", str(folder), "--engine", "vllm", "--dtype", "fp32"]
    command += ["--vllm-python", vllm_python(), "--port", str(port), "--", *FLAGS]
    changes = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with (here / "out").open("w") as out, (here / "err").open("w") as err:
        running = subprocess.Popen(command, cwd=here, env={**os.environ, **changes}, stdout=out, stderr=err)
        answered, end = False, time.monotonic() + 300
        while running.poll() is None:
            if time.monotonic() > end or answered:
                running.terminate()
            with socket.socket() as client:
                answered |= client.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.05)
    return running.returncode, answered, (here / "err").read_text()
