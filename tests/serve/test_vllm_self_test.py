"""Real vLLM on the CPU: a model that answers as when it was saved is served, one that was changed serves nobody."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.helpers import picture
from tests.serve.vllm_models import Case, Oracle, assert_same_tokens, build
from tests.serve.vllm_server import FLAGS, ROOT, serving, vllm_python
from vlm import load
from vlm.checkpoint import read_object

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0.02), ("bf16", 0.3)])
def test_a_model_as_it_was_saved_is_served(tmp_path: Path, dtype: str, bound: float) -> None:
    build(tmp_path / "model", "deep, mlp")
    with serving(tmp_path / "model", tmp_path, "--dtype", dtype) as server:
        said = re.search(r"self-test: .* are (\S+) apart \(up to (\S+) is rounding", server.log.read_text())
        assert said is not None
        assert float(said[2]) == bound
        assert float(said[1]) < bound / 4, "there is little room for other machines"
        asked = [Case("what is it?", (picture(1),))]
        got = server.ask(asked)
        if dtype == "fp32":
            assert_same_tokens(Oracle(*load(tmp_path / "model")), asked, got)


def gates_shut(weights: dict[str, torch.Tensor]) -> None:
    names = [name for name in weights if name.endswith("gate")]
    assert names
    for name in names:
        weights[name].zero_()


def projector_permuted(weights: dict[str, torch.Tensor]) -> None:
    name = max(name for name in weights if name.startswith("multi_modal_projector") and name.endswith("weight"))
    weights[name] = weights[name].flip(0).contiguous()


@pytest.mark.parametrize(
    ("kind", "change"),
    [("deep, mlp", gates_shut), ("mlp", projector_permuted)],
)
def test_a_model_that_was_changed_serves_nobody(
    tmp_path: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    folder = tmp_path / "model"
    build(folder, kind)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, answered, errors = watched(folder, tmp_path)
    assert code == 1
    assert not answered
    last = errors.rstrip("\n").rsplit("\n", 1)[-1]
    assert re.match(rf"vlm serve: {folder}: the model answers its test question differently .* apart, and", last), (
        errors
    )
    assert "--skip-self-test" in last
    assert 'File "/' not in errors, "a traceback"


def test_pictures_prepared_in_another_way_are_noticed_and_one_may_skip_the_test(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(folder, "mlp")
    path = folder / "processor_config.json"
    mean = read_object(path)["image_processor"]["image_mean"]
    text = path.read_text()
    path.write_text(re.sub(r'("image_mean": \[)[^]]*', rf"\1 {', '.join(str(value + 0.1) for value in mean)}", text))
    assert path.read_text() != text
    code, answered, errors = watched(folder, tmp_path)
    assert (code, answered) == (1, False)
    assert "differently" in errors
    with serving(folder, tmp_path, "--skip-self-test") as server:
        assert "self-test: skipped" in server.log.read_text()
        assert len(server.ask([Case("what is it?", (picture(1),))])) == 1


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
