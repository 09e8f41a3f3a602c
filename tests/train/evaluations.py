"""Evaluations asked for on the command line, and what they leave."""

import json
from pathlib import Path
from typing import Any

from vlm.cli import main

QUESTION = {"id": "a", "question": "what is it?", "answer": "a circle"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(model: Path, data: Path, out: Path, *options: str, task: str = "exact") -> int:
    options = ("--max-tokens", "6", "--batch-size", "4", *options)
    return main(["eval", str(model), "--task", task, "--data", str(data), "--out", str(out), *options])


def scores(folder: Path) -> dict[str, Any]:
    """Without what takes its time."""
    found = json.loads((folder / "scores.json").read_text())
    return {name: value for name, value in found.items() if "seconds" not in name}
