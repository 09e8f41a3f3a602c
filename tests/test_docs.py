"""The commands in README.md and docs/: all are parsed by the real command line, some are run.

A block opened with ```bash holds commands; opened with ```bash run it is also run in the slow tier: all such
blocks of a page in order, in one temporary folder that sees configs/.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vlm.cli import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if path.exists())
SEPARATORS = {"&&", "||", "|", ";", "&", "(", ")"}


class Block(NamedTuple):
    line: int
    tag: str
    text: str


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a page; `line` is that of the opening fence."""
    found: list[Block] = []
    fence, tag, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(markdown.splitlines(), start=1):
        mark = re.match(r"\s*(`{3,})(.*)", line)
        if not fence and mark:
            fence, tag, start, lines = mark[1], mark[2].strip(), number, []
        elif fence and line.strip() == fence:
            found.append(Block(start, tag, "\n".join(lines) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
    assert not fence, f"the block of line {start} is not closed"
    return found


def vlm_commands(script: str) -> Iterator[list[str]]:
    """The arguments of every call of vlm in a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        lexer.commenters = ""
        command: list[str] = []
        for token in [*lexer, ";"]:
            if token not in SEPARATORS:
                command.append(token)
                continue
            while command and re.fullmatch(r"[A-Za-z_]\w*=.*", command[0]):
                del command[0]  # a variable set for this command
            if command and command[0] in ("vlm", ".venv/bin/vlm"):
                yield without_redirects(command[1:])
            command = []


def without_redirects(words: list[str]) -> list[str]:
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if set(word) <= set("<>&") and word:
            next(rest, None)
            if kept and kept[-1] in ("1", "2"):
                kept.pop()
        else:
            kept.append(word)
    return kept


def complaints(markdown: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the command line says of a page's commands that it doesn't understand."""
    found: list[str] = []
    for block in blocks(markdown):
        if block.tag not in ("bash", "bash run"):
            continue
        for arguments in vlm_commands(block.text):
            try:
                parse(arguments)
            except SystemExit as stop:
                said = capsys.readouterr().err.strip().splitlines()[-1:]
                if stop.code:
                    found.append(f"line {block.line}: vlm {shlex.join(arguments)}: {said}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not complaints(page.read_text(encoding="utf-8"), capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_where_they_are_checked(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        language, _, rest = block.tag.partition(" ")
        assert language not in ("sh", "shell", "console", "zsh"), f"line {block.line}: use bash"
        assert language != "bash" or rest in ("", "run"), f"line {block.line}: bash or bash run, not {block.tag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configs_exist(page: Path) -> None:
    for name in re.findall(r"\bconfigs/[\w./-]+\.(?:yaml|json)\b", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_the_readme_shows_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(list(vlm_commands(block.text)) for block in blocks(text))


@pytest.mark.parametrize(
    "line",
    [
        "vlm demo --no-such-option",
        "cd x && vlm no-such-command",
        "A=1 .venv/bin/vlm demo \\\n  --no-such-option 3 > log &",
    ],
)
def test_a_wrong_command_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = f"Text\n\n```bash\n# a comment that isn't code\n{line}\n```\n"
    assert len(complaints(page, capsys)) == 1
    assert complaints(page.replace("```bash", "```text"), capsys) == []


def test_shell_syntax_is_understood() -> None:
    script = "vlm a 'b c' 2> log | grep x; B=2 vlm d a.b=c --e=f <in >>out  # vlm g\necho vlm h\n(vlm i) && vlm j"
    assert list(vlm_commands(f"{script} \\\n k\n")) == [
        ["a", "b c"],
        ["d", "a.b=c", "--e=f"],
        ["i"],
        ["j", "k"],
    ]


def scripts() -> dict[str, str]:
    found: dict[str, str] = {}
    for page in PAGES:
        script = "".join(block.text for block in blocks(page.read_text(encoding="utf-8")) if block.tag == "bash run")
        if script:
            found[page.name] = script
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", scripts())
def test_blocks_marked_run_do_run(page: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", scripts()[page]]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
