"""Tab completion, asked for as the shell asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("vlm eval m --task p", ["pope"]),
        ("vlm score sc", ["scienceqa"]),
        ("vlm sco", ["score"]),
        ("vlm eval m --sha", ["--shard"]),
    ],
)
def test_the_shell_completes_commands_options_and_tasks(line: str, words: list[str], tmp_path: Path) -> None:
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    told = tmp_path / "told"
    env = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(told)}
    subprocess.run([sys.executable, "-P", "-m", "vlm.cli"], env=env, check=True, capture_output=True)
    assert [word.strip() for word in told.read_text().split("\n")] == words
