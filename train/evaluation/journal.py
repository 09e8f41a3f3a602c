"""An evaluation folder while it grows: whose it is, and each answer as soon as it's there."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.evaluation.prompts import Prompt, Reply
from vlm.errors import UserError

SETTINGS, SCORES, REPORT = "settings.json", "scores.json", "report.html"


class Journal:
    """`folder`/answers.jsonl, or that of one shard (of `shards`), and settings.json, which says what is asked.

    A kill loses no more than the answers that were being made; what a folder of other settings holds is never touched.
    """

    def __init__(self, folder: Path, shard: int = 1, shards: int = 1) -> None:
        self.folder = folder
        self.path = folder / ("answers.jsonl" if shards == 1 else f"answers-{shard}-of-{shards}.jsonl")
        self._file: int | None = None
        self._lock: int | None = None

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder this evaluation's; UserError if it is another's, or no evaluation folder."""
        held = read_settings(self.folder)
        if held is None:
            if self.folder.exists() and not _ours(self.folder):
                raise UserError(f"{self.folder}: there already, and not an evaluation folder; use another --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_aside(self.folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False))
        elif differing := [name for name in {**held, **settings} if held.get(name) != plain(settings).get(name)]:
            if not any(path.stat().st_size for path in self.folder.glob("answers*.jsonl")):
                write_aside(self.folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False))
                return  # nothing was answered
            name = differing[0]
            raise UserError(
                f"{self.folder}: holds an evaluation with another {name.replace('_', ' ')} ("
                f"{shown(held.get(name))}, and not {shown(settings.get(name))}); use another --out"
            )

    def abandon(self) -> None:
        """Takes the folder back, if nothing was answered and nobody is at it."""
        answers = list(self.folder.glob("answers*.jsonl"))
        if not any(path.stat().st_size for path in answers) and not any(self.folder.glob("*.lock")):
            for path in (*answers, self.folder / SETTINGS):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a log is in it
                self.folder.rmdir()

    def read(self) -> dict[str, Reply]:
        """The replies so far, by id. What a kill cut off in the middle is forgotten."""
        return {reply.id: reply for reply in read_replies(self.path)}

    def open(self, replies: Iterable[Reply]) -> None:
        """Forgets all but these, to append others. UserError while another process does: answers would come twice."""
        self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise UserError(f"{self.folder}: another process is at work on this evaluation") from None
        write_aside(self.path, "".join(map(_line, replies)))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, replies: Sequence[Reply]) -> None:
        """One write for all of them, so that a batch is there as a whole or as a piece that `read` tells."""
        assert self._file is not None
        data = "".join(map(_line, replies)).encode()
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    @property
    def _lock_path(self) -> Path:
        return self.path.with_suffix(".lock")


def read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    return found if isinstance(found, dict) else None


def read_replies(path: Path) -> list[Reply]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off by a kill, or empty
        found.append(Reply(row["id"], row.get("answer"), row.get("error")))
    return found


def digest(prompts: Sequence[Prompt]) -> str:
    """Of everything that is asked: other questions, words, demonstrations or images have another one."""
    total = hashlib.sha256()
    for prompt in prompts:
        turns = [[turn.text, str(turn.image), turn.answer] for turn in prompt.turns]
        total.update(json.dumps([prompt.id, turns]).encode())
    return total.hexdigest()[:16]


def model_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of a model folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt") and path.is_file():
            total.update(path.name.encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def write_aside(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _ours(folder: Path) -> bool:
    """An empty folder, but for the settings that another shard is writing at this moment."""
    return folder.is_dir() and all(path.name.startswith(f"{SETTINGS}.partial-") for path in folder.iterdir())


def _line(reply: Reply) -> str:
    return json.dumps(reply.as_json(), ensure_ascii=False) + "\n"
