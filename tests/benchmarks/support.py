"""What the benchmark scripts share: JSONL files, conversations, and the command line run as a user would."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
# A script's own folder comes first on the path, and data.py in it would hide the package `data`.
sys.path.insert(0, str(ROOT))
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
