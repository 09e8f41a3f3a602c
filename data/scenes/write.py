"""Writes scenes to disk: PNG pictures and JSONL rows, whole or not at all."""

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

from data.scenes.questions import KINDS, Question
from data.scenes.rows import (
    Drawn,
    Row,
    heldout_item,
    lesson_rows,
    save_picture,
    text_row,
    train_pair,
    train_rows,
    unseen_item,
)
from data.scenes.world import HELD_OUT
from vlm.errors import UserError
from vlm.threads import usable_cores

FORMAT_VERSION: Final = 8
MOST_QUESTIONS: Final = 12
_QUESTIONS_PER_LESSON_SCENE: Final = 4

_SETTINGS_FILE: Final = "scenes.json"
_FILES: Final = {
    "train": ("captions.jsonl", "captions_chat.jsonl", "chat.jsonl"),
    "lessons": ("lessons.jsonl",),
    "text": ("text.jsonl",),
    "heldout": ("heldout.jsonl",),
    "unseen": ("unseen.jsonl",),
}
_CHUNK: Final = 500
_INLINE: Final = 2 * _CHUNK
_MOST_PROCESSES: Final = 8


class _Job(NamedTuple):
    """Items `start` to `stop` of one split, made by one process; `settings` are those of the whole."""

    split: str
    start: int
    stop: int
    settings: dict[str, int]
    images: str


def write_scenes(
    out: Path,
    *,
    train: int = 20_000,
    heldout: int = 1_000,
    unseen: int = 500,
    lessons: int = 4_500,
    text_rows: int = 16_000,
    seed: int = 0,
    questions_per_scene: int = 6,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes pictures and rows into the folder `out` and returns the content of its scenes.json.

    `train` and `lessons` count pictures; `heldout` and `unseen` count questions, each with its own picture, and
    are rounded up so that every kind has as many; `text_rows` counts rows without a picture. The files depend
    on these numbers and the seed only, never on `processes` (default: the cores at hand). `progress` is
    called with items done and items in all. A folder that holds the same scenes already is left as it is.
    Raises UserError for a number out of range, and where `out` holds anything else.
    """
    settings = {
        "seed": _bounded("seed", seed),
        "train": _bounded("train", train),
        "heldout": _whole_rounds(_bounded("heldout", heldout)),
        "unseen": _whole_rounds(_bounded("unseen", unseen)),
        "lessons": _bounded("lessons", lessons),
        "text_rows": _bounded("text_rows", text_rows),
        "questions_per_scene": _bounded("questions_per_scene", questions_per_scene, 1, MOST_QUESTIONS),
    }
    if processes is not None:
        _bounded("processes", processes, 1)
    summary = {
        "format": "vlm-scenes",
        "version": FORMAT_VERSION,
        "settings": settings,
        "held_out_pairs": [list(pair) for pair in HELD_OUT],
        "kinds": list(KINDS),
    }
    if _is_done(out, summary):
        return summary
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)  # mkdtemp makes it private
        _write_files(aside, settings, processes, progress)
        (aside / _SETTINGS_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return summary


def _bounded(name: str, value: int, least: int = 0, most: int | None = None) -> int:
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{name} must be {bounds}, not {value}")
    return value


def _whole_rounds(count: int) -> int:
    return -(-count // len(KINDS)) * len(KINDS)


def _is_done(out: Path, summary: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; scenes are written into a folder")
    if not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / _SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != summary["format"]:
        raise UserError(f"{out} is not empty and holds no scenes; choose another folder")
    if found != summary:
        difference = _difference(found, summary)
        raise UserError(f"{out} holds scenes with {difference}; choose another folder or remove it")
    return True


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    there = found.get("settings")
    if found.get("version") == wanted["version"] and isinstance(there, dict):
        for name, value in wanted["settings"].items():
            if there.get(name) != value:
                return f"{name} {there.get(name)} where {value} is asked for"
    return "settings of another version"


def _jobs(images: Path, settings: dict[str, int]) -> Iterator[_Job]:
    # Training pictures are made by twins, so no job may start with the second of them.
    assert _CHUNK % 2 == 0
    for split in _FILES:
        count = settings["text_rows" if split == "text" else split]
        for start in range(0, count, _CHUNK):
            yield _Job(split, start, min(start + _CHUNK, count), settings, str(images))


def _write_files(
    folder: Path,
    settings: dict[str, int],
    processes: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    images = folder / "images"
    for split in ("train", "heldout", "unseen", "lessons"):
        (images / split).mkdir(parents=True)
    jobs = list(_jobs(images, settings))
    total = sum(job.stop - job.start for job in jobs)
    if processes is None:
        processes = min(usable_cores(), _MOST_PROCESSES) if total > _INLINE else 1
    done = 0
    with ExitStack() as stack:
        handles = {
            name: stack.enter_context((folder / name).open("w", encoding="utf-8"))
            for names in _FILES.values()
            for name in names
        }
        for job, texts in zip(jobs, _results(stack, jobs, processes), strict=True):
            for name, text in zip(_FILES[job.split], texts, strict=True):
                handles[name].write(text)
            done += job.stop - job.start
            if progress is not None:
                progress(done, total)


def _results(stack: ExitStack, jobs: list[_Job], processes: int) -> Iterator[list[str]]:
    """What the jobs return, in order."""
    if processes == 1:
        return map(_run, jobs)
    # Spawned, not forked: the caller may have threads (torch does) that a fork would leave half-alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(jobs) or 1), mp_context=context)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool.map(_run, jobs)


def _run(job: _Job) -> list[str]:
    """Draws the pictures of a job and returns the lines for each of its files."""
    lines: list[list[str]] = [[] for _ in _FILES[job.split]]
    for files in _RUN[job.split](job):
        for kept, rows in zip(lines, files, strict=True):
            kept.extend(json.dumps(row) + "\n" for row in rows)
    return ["".join(kept) for kept in lines]


def _train(job: _Job) -> Iterator[tuple[Sequence[Row], ...]]:
    seed = job.settings["seed"]
    for pair in range(job.start // 2, (job.stop + 1) // 2):
        for index, drawn in enumerate(train_pair(seed, pair), start=2 * pair):
            if index < job.stop:
                image = _save(job, index, drawn)
                rows = train_rows(seed, index, drawn.scene, image, job.settings["questions_per_scene"])
                yield tuple((row,) for row in rows)


def _lessons(job: _Job) -> Iterator[tuple[Sequence[Row], ...]]:
    seed, count = job.settings["seed"], job.settings["lessons"]
    for index in range(job.start, job.stop):
        drawn, rows = lesson_rows(seed, index, count, _QUESTIONS_PER_LESSON_SCENE, _image(job, index))
        _save(job, index, drawn)
        yield (rows,)


def _text(job: _Job) -> Iterator[tuple[Sequence[Row], ...]]:
    for index in range(job.start, job.stop):
        yield ((text_row(job.settings["seed"], index),),)


def _heldout(job: _Job) -> Iterator[tuple[Sequence[Row], ...]]:
    for index in range(job.start, job.stop):
        yield ((_asked(job, index, *heldout_item(job.settings["seed"], index)),),)


def _unseen(job: _Job) -> Iterator[tuple[Sequence[Row], ...]]:
    for index in range(job.start, job.stop):
        yield ((_asked(job, index, *unseen_item(job.settings["seed"], index)),),)


_RUN: Final = {"train": _train, "lessons": _lessons, "text": _text, "heldout": _heldout, "unseen": _unseen}


def _asked(job: _Job, index: int, drawn: Drawn, question: Question) -> dict[str, Any]:
    return {
        "id": f"{job.split}-{index:06d}",
        "image": _save(job, index, drawn),
        "question": question.text,
        "answer": question.answer,
        "kind": question.kind,
    }


def _image(job: _Job, index: int) -> str:
    return f"{job.split}/{index:06d}.png"


def _save(job: _Job, index: int, drawn: Drawn) -> str:
    image = _image(job, index)
    save_picture(drawn, Path(job.images) / image)
    return image
