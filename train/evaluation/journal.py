"""An evaluation folder while it grows: whose it is, and each answer as soon as it's there."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from data.pictures import ImageRef
from train.evaluation.prompts import Prompt, Reply
from vlm.checkpoint import read_object
from vlm.errors import UserError

_REPLIES = msgspec.json.Decoder(Reply)
SETTINGS, SCORES, REPORT = "settings.json", "scores.json", "report.html"
UNIMPORTANT = {"data", "images", "shots_data", "shots_images", "mode"}


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
        """Makes the folder this evaluation's, and this process's until `close`.

        UserError if it is another's, or no evaluation folder, or another process is at work there.
        """
        if read_settings(self.folder) is None and self.folder.exists() and not _ours(self.folder):
            raise UserError(f"{self.folder}: there already, and not an evaluation folder; use another --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
        except OSError as error:
            raise UserError(f"{self.folder}: can't be written ({error.strerror})") from None
        held = read_settings(self.folder)
        name = None if held is None else differing(held, settings)
        if name and (self._others_at_work() or any(path.stat().st_size for path in self.folder.glob("answers*.jsonl"))):
            self.close()
            raise UserError(
                f"{self.folder}: holds an evaluation with another {name.replace('_', ' ')} ("
                f"{shown(held and held.get(name))}, and not {shown(settings.get(name))}); use another --out"
            )
        write_aside(self.folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False))

    def _lock_folder(self) -> None:
        while self._lock is None:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise UserError(f"{self.folder}: another process is at work on this evaluation") from None
            if self._lock_path.exists() and os.fstat(lock).st_ino == self._lock_path.stat().st_ino:
                self._lock = lock
            else:  # whoever held it took it away meanwhile
                os.close(lock)

    def _others_at_work(self) -> bool:
        return any(_is_locked(path) for path in self.folder.glob("*.lock") if path != self._lock_path)

    def abandon(self) -> None:
        """Takes the folder back, if nothing was answered and nobody else is at it; to be called after `close`."""
        answers = list(self.folder.glob("answers*.jsonl"))
        if not any(path.stat().st_size for path in answers) and not self._others_at_work():
            for path in (*answers, *self.folder.glob("*.lock"), self.folder / SETTINGS):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a log is in it
                self.folder.rmdir()

    def open(self, replies: Iterable[Reply]) -> None:
        """Forgets all but these, to append others."""
        write_aside(self.path, "".join(map(_line, replies)))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, replies: Sequence[Reply]) -> None:
        """One write for all of them, so that a batch is there as a whole or as a piece that `read_replies` tells."""
        assert self._file is not None
        data = "".join(map(_line, replies)).encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; what was answered before is kept") from None

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
    return read_object(path) if path.is_file() else None


def read_replies(*folders: Path) -> dict[str, Reply]:
    """What all processes have left in these folders, by id; a question that failed in one and has an answer in another
    has an answer. What a kill cut off in the middle is forgotten."""
    found: dict[str, Reply] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("answers*.jsonl"))):
        for line in path.read_bytes().split(b"\n"):
            try:
                reply = _REPLIES.decode(line)
            except (msgspec.MsgspecError, ValueError):
                continue  # cut off by a kill, or empty
            before = found.get(reply.id)
            if (before is None or before.error) and (reply.answer is not None or reply.error):
                found[reply.id] = reply
    return found


def differing(held: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting by which two evaluations differ; where files lie and how answers are scored are none."""
    ours, theirs = plain(held), plain(settings)
    elsewhere = {"model"} if ours.get("model_sha256") and theirs.get("model_sha256") else set()
    names = (name for name in {**ours, **theirs} if name not in UNIMPORTANT | elsewhere)
    return next((name for name in names if ours.get(name) != theirs.get(name)), None)


def digest(prompts: Sequence[Prompt]) -> str:
    """Of everything that is asked but the pictures: other questions, words or demonstrations have another one."""
    total = hashlib.sha256()
    for prompt in prompts:
        turns = [
            [turn.text, turn.answer, *([turn.asked.messages] if turn.asked is not None else [])]
            for turn in prompt.turns
        ]
        total.update(json.dumps([prompt.id, turns]).encode())
    return total.hexdigest()[:16]


class PictureDigests:
    """Of the pictures of a prompt: their names and sizes, wherever they lie."""

    def __init__(self) -> None:
        self._known: dict[ImageRef, str] = {}

    def __call__(self, prompt: Prompt) -> str:
        if not (images := prompt.images):
            return ""
        for image in images:
            if image not in self._known:
                self._known[image] = _named(image)
        return hashlib.sha256("\n".join(self._known[image] for image in images).encode()).hexdigest()[:12]


def _named(image: ImageRef) -> str:
    if isinstance(image, Path):
        return f"{image.name} {image.stat().st_size if image.is_file() else None}"
    return Path(str(image)).name


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
        partial.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair can't be written
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


def _is_locked(path: Path) -> bool:
    """By a process that lives: a killed one's lock is a file, and no more."""
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _ours(folder: Path) -> bool:
    """An empty folder, but for what another shard is writing at this moment."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
    return all(name.startswith(f"{SETTINGS}.partial-") or re.fullmatch(r"answers.*\.lock", name) for name in names)


def _line(reply: Reply) -> str:
    return json.dumps(reply.as_json(), ensure_ascii=False) + "\n"
