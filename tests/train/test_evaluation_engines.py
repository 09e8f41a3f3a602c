"""The same questions through every engine, as whole processes: the same answers."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serve.helpers import picture
from tests.serve.vllm_models import SIZES, Case, Oracle, build
from tests.serve.vllm_server import FLAGS, vllm_python
from tests.train.test_evaluation_kills import ROOT, without_times
from vlm import load
from vlm.images import read_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ITEMS, MAX_TOKENS = 500, 12
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module", params=["mlp", "deep, mlp"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "model"
    build(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, rows = tmp_path_factory.mktemp("asked"), random.Random(0), []
    for number in range(ITEMS):
        picture(number, *rng.choice(SIZES)).save(folder / f"{number}.png")
        question = f"{number} {rng.choice(['what is it?', 'is <image> here?', 'how many <|end|> are left?'])}"
        rows.append({"id": number, "image": f"{number}.png", "question": question, "answer": "x"})
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "q.jsonl"


def evaluate(model: str | Path, data: Path, out: Path, *options: str, launcher: tuple[str, ...] = ()) -> dict[str, str]:
    start = launcher or (sys.executable, "-P", "-m")
    command = [*start, "vlm.cli", "eval", str(model), "--task", "exact", "--data", str(data), "--out", str(out)]
    command += ["--max-tokens", str(MAX_TOKENS), "--precision", "fp32", *options]
    subprocess.run(command, env=ENVIRONMENT, check=True, cwd=out.parent)
    assert json.loads((out / "scores.json").read_text())["failed"] == 0
    rows = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    # of a character that is cut off in the middle vLLM says nothing, where others say that it is none
    return {row["id"]: re.sub(r"[\ufffd\s]+$", "", row["answer"]) for row in rows}


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    command = [sys.executable, "-P", "-m", "vlm.cli", "serve", str(model), "--port", "0", "--dtype", "fp32"]
    with log.open("w") as file:
        running = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"(http://\S+:\d+)", log.read_text())):
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        yield found[1]
    finally:
        running.terminate()
        running.wait(60)


def test_all_engines_give_the_same_answers(model: Path, data: Path, tmp_path: Path) -> None:
    here = evaluate(model, data, tmp_path / "torch")
    assert len(set(here.values())) > ITEMS // 4  # questions and pictures matter
    with served(model, tmp_path / "server.log") as url:
        assert_same(model, data, here, evaluate("model", data, tmp_path / "url", "--engine", url))
    flags = ("--vllm-python", vllm_python(), "--vllm-args", " ".join(FLAGS))
    assert_same(model, data, here, evaluate(model, data, tmp_path / "vllm", "--engine", "vllm", *flags))


def assert_same(model: Path, data: Path, here: dict[str, str], there: dict[str, str]) -> None:
    """Answers equal, or differ where our two best logits are within 1e-3, in 2 % of the cases at most."""
    differing = [name for name in here if here[name] != there[name]]
    assert len(differing) <= 0.02 * len(here)
    oracle = Oracle(*load(model), max_tokens=MAX_TOKENS)
    rows = {str(row["id"]): row for row in map(json.loads, data.read_text().splitlines())}
    for name in differing:
        case = Case(rows[name]["question"], (read_image(data.parent / rows[name]["image"]),))
        said = oracle.answer(case).output
        assert min(oracle.gap(case, said[:length]) for length in range(len(said))) < 1e-3


def test_two_processes_share_the_questions(tmp_path: Path, data: Path) -> None:
    build(tmp_path / "model", "mlp")
    options = ("--controls", "--device", "cpu")
    alone = evaluate(tmp_path / "model", data, tmp_path / "alone", *options)
    torchrun = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    shared = evaluate(tmp_path / "model", data, tmp_path / "shared", *options, launcher=torchrun)
    assert shared == alone
    assert without_times(tmp_path / "shared") == without_times(tmp_path / "alone")
    assert len(list((tmp_path / "shared").glob("answers-*-of-2.jsonl"))) == 2
