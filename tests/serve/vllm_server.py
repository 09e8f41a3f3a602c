"""A real vLLM behind `vlm serve --engine vllm`, for the tests."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.helpers import CHAT, data_url
from tests.serve.vllm_models import Case
from tests.vllm_environment import UnavailableError, environment

ROOT = Path(__file__).resolve().parents[2]
KEY = "sesame"
FLAGS = ("--enforce-eager", "--max-model-len", "512")


def vllm_python() -> str:
    """The interpreter of the environment with vLLM; the test is skipped where there can be none."""
    try:
        return str(environment())
    except UnavailableError as error:
        pytest.skip(f"NO REAL vLLM HERE, NOTHING OF IT IS TESTED: {error}")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    def client(self, key: str | None = KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def ask(
        self, asked: Sequence[Case], model: str = "tiny", max_tokens: int = 24, at_once: int = 6
    ) -> list[tuple[int, list[int]]]:
        """For each case the number of its prompt's tokens and the greedy answer's, several under way at a time."""
        with self.client() as client, ThreadPoolExecutor(at_once) as pool:

            def one(case: Case) -> tuple[int, list[int]]:
                response = client.post(CHAT, json=chat(case, model=model, max_tokens=max_tokens, return_token_ids=True))
                assert response.status_code == 200, response.text
                answer = response.json()
                return answer["usage"]["prompt_tokens"], answer["choices"][0]["token_ids"]

            return list(pool.map(one, asked))

    def metrics(self) -> dict[str, float]:
        """vLLM's figures, summed over labels."""
        found: dict[str, float] = {}
        with self.client() as client:
            text = client.get("/metrics").text
        for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? ([-+.\dEe]+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found


def chat(case: Case, model: str = "tiny", **settings: Any) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in case.images]
    content = [*images, {"type": "text", "text": case.text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **settings}


@contextmanager
def serving(
    model: Path, folder: Path, *options: str, flags: Sequence[str] = FLAGS, cores: str = "auto"
) -> Iterator[Server]:
    """The server over a model; its log lies in `folder`, which is also its current one, with traps in it.

    cores: which of them each of vLLM's ranks takes, in its own notation.
    """
    for name in ("vllm", "serve", "data"):
        (folder / f"{name}.py").write_text("raise ImportError('the current folder was imported from')\n")
    command = [sys.executable, "-P", "-m", "vlm.cli", "serve", str(model), "--engine", "vllm", "--name", "tiny"]
    command += ["--vllm-python", vllm_python(), "--port", "0", "--dtype", "fp32", *options, "--", *flags]
    changes = {"PYTHONPATH": str(ROOT), "VLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    changes["VLLM_CPU_OMP_THREADS_BIND"] = cores
    log = folder / "vllm.log"
    with log.open("w") as file:
        running = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **changes}, stdout=file, stderr=subprocess.STDOUT, text=True
        )
    try:
        server = Server(running, _ready(running, log), log)
        yield server
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def _ready(running: subprocess.Popen[str], log: Path, seconds: float = 240) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert running.poll() is None, log.read_text()[-4000:]
        found = re.search(r"will be served at (http://\S+:\d+)", log.read_text())
        if found:
            try:
                if httpx.get(found[1] + "/health", timeout=5).status_code == 200:
                    return found[1]
            except httpx.TransportError:
                pass
        time.sleep(0.5)
    raise AssertionError(f"vLLM was not ready in {seconds} seconds: {log.read_text()[-4000:]}")
