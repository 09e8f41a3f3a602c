"""Small files as the benchmarks are published, and the command that scores them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.cli import main


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def annotation(question: int, answers: Sequence[str], **more: Any) -> dict[str, Any]:
    """A row of VQA annotations."""
    said = [{"answer": answer, "answer_id": n, "answer_confidence": "yes"} for n, answer in enumerate(answers, 1)]
    row = {"question_id": question, "image_id": 7, "answers": said, "answer_type": "other", "question_type": "what"}
    return {**row, **more}


def score(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vlm score`."""
    code = main(["score", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err
