"""What the benchmark scripts share: JSONL files, conversations, the command line run as a user would, measurements of
processes, and tables of them."""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
# A script's own folder comes first on the path, and data.py in it would hide the package `data`.
sys.path.insert(0, str(ROOT))
QUIET = 0.2  # cores that others may use when a measurement begins
COMMAND = [sys.executable, "-P", "-m", "vlm.cli"]


def vlm(*arguments: str) -> None:
    subprocess.run([*COMMAND, *arguments], check=True)


def vlm_side_by_side(*commands: list[str]) -> None:
    """Runs commands at the same time, on one core each."""
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*COMMAND, *arguments], env=one_core) for arguments in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a run failed; its message stands above")


def megabytes() -> float:
    """Memory of this process and all below it. What they share counts once; of mapped files, libraries above all, those
    of the process that has most, since a share would change with whoever else on the machine has them open."""
    me = psutil.Process()
    kept, files = 0, 0
    for process in (me, *me.children(recursive=True)):
        told = [Path(f"/proc/{process.pid}/{name}").read_text(encoding="utf-8") for name in ("smaps_rollup", "status")]
        fields = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", "\n".join(told), re.MULTILINE)}
        kept += fields["Pss_Anon"] + fields["Pss_Shmem"]
        files = max(files, fields["RssFile"])
    return (kept + files) * 1024 / 1e6


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(): an answer may hold other line ends than JSONL's
        return [json.loads(line) for line in lines]


def conversation(exchanges: Iterable[tuple[str, str]], first: Mapping[str, str]) -> dict[str, Any]:
    """Questions and answers as one chat row that begins with `first`, a picture or a text."""
    messages: list[dict[str, Any]] = []
    for question, answer in exchanges:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    messages[0]["content"].insert(0, dict(first))
    return {"messages": messages}


def metrics(evaluation: Path) -> dict[str, float]:
    """The metrics of an evaluation folder; scores by kind under the kind's name."""
    held = json.loads((evaluation / "scores.json").read_text(encoding="utf-8"))["metrics"]
    return {name.removeprefix("accuracy/"): round(value, 4) for name, value in held.items()}


def figures(command: Sequence[str], patience: float, env: Mapping[str, str]) -> dict[str, Any]:
    """What the last line of a command's output says, and its seconds, processor seconds, peak MB, and what others took
    meanwhile (cores). It begins when others leave the cores alone, or after `patience` seconds."""
    wait_for_quiet(patience)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    with tempfile.NamedTemporaryFile() as file:
        before, began = busy(), time.perf_counter()
        pid = os.posix_spawn(command[0], command, env, file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1)])
        _, status, usage = os.wait4(pid, 0)
        seconds, spent = time.perf_counter() - began, busy() - before
        if status:
            raise SystemExit(f"{' '.join(command)} failed; its message stands above")
        lines = Path(file.name).read_text(encoding="utf-8").splitlines()
    cpu = usage.ru_utime + usage.ru_stime
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child's peak is never below that of its parent
    return {
        **json.loads(lines[-1]),
        "seconds": seconds,
        "cpu": cpu,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6 if usage.ru_maxrss > own else float("nan"),
        "others": max(0.0, spent - cpu) / seconds,
    }


def busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def wait_for_quiet(patience: float) -> None:
    began = time.perf_counter()
    while True:
        before, at = busy(), time.perf_counter()
        time.sleep(1 if patience else 0.1)
        if (busy() - before) / (time.perf_counter() - at) < QUIET or time.perf_counter() - began > patience:
            return


def middles(rounds: Sequence[dict[str, Any]], *names: str, digits: int = 1) -> list[str]:
    """Medians, with the lowest and highest where these differ."""
    cells = []
    for name in names:
        values = [each[name] for each in rounds]
        low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
        cells.append(middle if low == high else f"{middle} ({low} to {high})")
    return cells


def others(rounds: Sequence[dict[str, Any]]) -> str:
    return f"{max(each['others'] for each in rounds):.2f}"


def head(title: str, *names: str) -> None:
    print(f"\n### {title}\n")
    line(*names)
    line(*["---"] * len(names))


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
