"""What the serving benchmarks share: the demo's held-out questions, a server of either engine, and light clients.

The clients write ready bytes to plain connections, since on a small machine they share its cores with the server.
"""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from support import COMMAND

from data.scenes.draw import render
from data.scenes.questions import Question
from data.scenes.rows import heldout_item

NAME = "demo"
READY_SECONDS = 600


@dataclass(frozen=True)
class Asked:
    """A held-out question of the demo with its picture."""

    question: Question
    url: str

    def body(self, image: bool = True, **settings: Any) -> bytes:
        """A chat request, as training and evaluation render the question."""
        parts = [{"type": "image_url", "image_url": {"url": self.url}}] if image else []
        content = [*parts, {"type": "text", "text": self.question.text}]
        message = {"role": "user", "content": content if image else self.question.text}
        return json.dumps({"model": NAME, "messages": [message], "temperature": 0, **settings}).encode()


def held_out(seed: int, start: int, stop: int) -> list[Asked]:
    """Questions `start` to `stop` about the held-out scenes of the demo with this seed; past its last they go on."""
    found = []
    for index in range(start, stop):
        drawn, question = heldout_item(seed, index)
        out = io.BytesIO()
        Image.fromarray(render(*drawn)).save(out, "PNG")
        found.append(Asked(question, f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"))
    return found


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    ready_after: float

    def metrics(self) -> dict[str, float]:
        """vLLM's figures by name, summed over labels; {} of a server that has none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError:
            return {}
        found: dict[str, float] = {}
        for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? ([-+.\dEe]+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time by process (of one that is alone: its main thread's and the others')."""
        below = [self.process.pid, *_children(self.process.pid)]
        spent: dict[str, float] = {}
        for pid in below:
            name, seconds = _spent(Path(f"/proc/{pid}"))
            if len(below) == 1:
                main = _spent(Path(f"/proc/{pid}/task/{pid}"))[1]
                return {"main thread": main, "other threads": seconds - main}
            spent[name] = spent.get(name, 0.0) + seconds
        return spent


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_children(child)]
    return found


def _spent(folder: Path) -> tuple[str, float]:
    """Name and seconds of a process or thread, without those of its children."""
    head, _, rest = (folder / "stat").read_text().rpartition(")")
    user, system = rest.split()[11:13]
    return head.partition("(")[2], (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(model: Path, engine: str, *options: str) -> Iterator[Server]:
    """`vlm serve` over a model, at a free port, once it answers."""
    command = [*COMMAND, "serve", str(model), "--engine", engine, "--name", NAME, "--port", "0", *options]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
        try:
            port = _port(process, log)
            yield Server(process, port, time.perf_counter() - began)
        finally:
            process.terminate()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        said = log.read_text(errors="replace")
        if process.poll() is not None:
            errors = "\n".join(line for line in said.splitlines() if "Error: " in line)[:2000]
            raise SystemExit(f"the server ended: {errors or said[-2000:]}")
        found = re.search(r"served at http://[\d.]+:(\d+)", said)
        if found:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/health", timeout=5):
                    return int(found[1])
            except OSError:
                pass
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready in {READY_SECONDS} seconds: {log.read_text(errors='replace')[-3000:]}")


@dataclass(frozen=True)
class Run:
    """seconds: until the last answer was there; latencies [s] and answers in the order of the requests."""

    seconds: float
    latencies: list[float]
    answers: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def texts(self) -> list[str]:
        return [answer["choices"][0]["message"]["content"] or "" for answer in self.answers]


def ask(port: int, bodies: Sequence[bytes], clients: int) -> Run:
    """Each of so many clients sends its next request when it has the answer to its last. SystemExit for an error."""
    return asyncio.run(_ask(port, bodies, clients))


async def _ask(port: int, bodies: Sequence[bytes], clients: int) -> Run:
    answers: list[bytes] = [b""] * len(bodies)
    latencies = [0.0] * len(bodies)
    todo = iter(range(len(bodies)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in todo:
            sent = time.perf_counter()
            answers[index] = await _post(reader, writer, bodies[index])
            latencies[index] = time.perf_counter() - sent
        writer.close()
        await writer.wait_closed()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(min(clients, len(bodies)))))
    return Run(time.perf_counter() - began, latencies, [json.loads(answer) for answer in answers])


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    said = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = re.search(r"content-length: (\d+)", said, re.IGNORECASE)
    answer = await reader.readexactly(int(length[1]) if length else 0)
    if " 200 " not in said.partition("\r\n")[0]:
        raise SystemExit(f"the server refused a question: {said.partition(chr(13))[0]} {answer[:500]!r}")
    return answer
