"""Where the rows of a file begin, found once: indexes of big files are kept on disk and found again by the next run."""

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.progress import Tell, progress
from vlm.errors import UserError, first_line

Arrays = dict[str, np.ndarray[Any, Any]]
KEEP_FROM = 64 << 20  # bytes of a file of which the index is worth a file of its own
_FEW = 16  # files of which a fingerprint takes in more than names and sizes: contents ...
_WHOLE, _STRETCHES = 16 << 20, 64  # ... of so many bytes, in so many places where there are more
_VERSION = 2  # of what the builders make; an index of another one is built anew


def cache_folder() -> Path:
    """Where indexes are kept: the environment's VLM_CACHE, by default ~/.cache/vlm."""
    try:
        return Path(os.environ.get("VLM_CACHE") or "~/.cache/vlm").expanduser()
    except RuntimeError:
        raise UserError("no home folder to keep indexes in; name a folder for them in VLM_CACHE") from None


def indexed(kind: str, path: Path, build: Callable[[BinaryIO, Tell], Arrays], keep_from: float | None = None) -> Arrays:
    """What `build` makes of a file: remembered by the file's path, size and time of change when it is a big one.

    keep_from: bytes of a big one (by default KEEP_FROM); less where there are many of them.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_size < (KEEP_FROM if keep_from is None else keep_from):
                return _build(path, file, state.st_size, build)
            name = os.path.abspath(path)  # noqa: PTH100 (Path.absolute keeps the dots)
            key = f"{_VERSION}\n{kind}\n{name}\n{state.st_size}\n{state.st_mtime_ns}".encode(errors="surrogateescape")
            slot = cache_folder() / "index" / f"{blake2b(key.splitlines()[1] + os.fsencode(name)).hexdigest()[:32]}.npz"
            kept = _read(slot, key)
            if kept is None:
                kept = _build(path, file, state.st_size, build)
                _write(slot, key, kept)
            return kept
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def fingerprint(files: Sequence[Path], *more: object) -> str:
    """Tells data from other data, wherever they lie: by `more`, by names and sizes, and by contents of a few files, of
    big ones in stretches from the first byte to the last. What changes between these goes unnoticed."""
    digest = blake2b(repr(more).encode(errors="surrogatepass"), digest_size=16)
    for path in files:
        try:
            size = path.stat().st_size
            digest.update(f"\n{path.name}\n{size}\n".encode(errors="surrogateescape"))
            if len(files) > _FEW:
                continue
            places, length = (1, size) if size <= _WHOLE else (_STRETCHES, _WHOLE // _STRETCHES)
            with path.open("rb") as file:
                for place in range(places):
                    file.seek((size - length) * place // max(1, places - 1))
                    digest.update(file.read(length))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    return digest.hexdigest()


def _build(path: Path, file: BinaryIO, size: int, build: Callable[[BinaryIO, Tell], Arrays]) -> Arrays:
    with progress(f"indexing {path.name}", size, bytes=True) as tell:
        return build(file, tell)


def _read(slot: Path, key: bytes) -> Arrays | None:
    """The arrays of a slot, or None: not there, of another state of the file, or damaged (zip checks its sums)."""
    try:
        with slot.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["key"].tobytes() != key:
                return None
            return {name: arrays[name] for name in arrays.files if name != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(slot: Path, key: bytes, arrays: Arrays) -> None:
    """Written aside and renamed, so that processes that build at once don't disturb each other."""
    try:
        slot.parent.mkdir(parents=True, exist_ok=True)
        aside, name = tempfile.mkstemp(dir=slot.parent, suffix=".new")
        try:
            with os.fdopen(aside, "wb") as file:
                # the stubs know no arrays by names of one's own
                np.savez(file, key=np.frombuffer(key, np.uint8), **arrays)  # type: ignore[arg-type]
            Path(name).replace(slot)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        print(f"{slot.parent}: the index isn't kept ({error.strerror}); it's built again next time", file=sys.stderr)
