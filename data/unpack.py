"""Packed files (.gz) of rows: unpacked once into the cache, so that each row can be read by its place."""

import gzip
import os
import shutil
import tempfile
import zlib
from hashlib import blake2b
from pathlib import Path

from data.index import cache_folder
from data.progress import progress
from vlm.errors import UserError, first_line

_CHUNK = 1 << 20
MOST_TIMES = 200  # as large as the packed file: texts come to 3 to 50 times
_ALWAYS = 64 << 20  # bytes that any file may come to
_LEFT_FREE = 256 << 20  # bytes of the disk


def unpacked(path: Path) -> Path:
    """The file that a .gz holds, in the cache. UserError for one that is broken, cut off, or far larger than its size
    tells: whoever made it may have wanted to fill a disk."""
    try:
        state = path.stat()
        name = os.path.abspath(path)  # noqa: PTH100 (Path.absolute keeps the dots)
        folder = cache_folder() / "unpacked" / blake2b(os.fsencode(name), digest_size=16).hexdigest()
        file = folder / f"{state.st_size}-{state.st_mtime_ns}-{path.stem}"
        if not file.is_file():
            _unpack(path, file, max(_ALWAYS, MOST_TIMES * state.st_size), state.st_size)
        return file
    except OSError as error:
        raise UserError(f"{path}: cannot be unpacked ({error.strerror or first_line(error)})") from None


def _unpack(path: Path, file: Path, most: int, size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside, name = tempfile.mkstemp(dir=file.parent, suffix=".new")
    written = 0
    try:
        with (
            path.open("rb") as packed,
            os.fdopen(aside, "wb") as target,
            gzip.GzipFile(fileobj=packed) as source,
            progress(f"unpacking {path.name}", size, bytes=True) as tell,
        ):
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                if written > most:
                    raise UserError(
                        f"{path}: comes to more than {most >> 20} MB, {MOST_TIMES} times its size; unpack it yourself "
                        "if that is right"
                    )
                if written % (64 * _CHUNK) < _CHUNK and shutil.disk_usage(file.parent).free < _LEFT_FREE:
                    raise UserError(f"{path}: doesn't fit {file.parent}; unpack it elsewhere, or set VLM_CACHE")
                target.write(chunk)
                tell(packed.tell())
        Path(name).replace(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = "it ends in the middle; was it cut off?" if isinstance(error, EOFError) else first_line(error)
        raise UserError(f"{path}: not a sound .gz ({why})") from None
    finally:
        Path(name).unlink(missing_ok=True)
    for old in file.parent.iterdir():  # of the file as it was before
        if old != file and not old.name.endswith(".new"):
            old.unlink(missing_ok=True)
