"""How far long work has come: a bar on a terminal, lines elsewhere, nothing for what is done in a moment."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Tell(Protocol):
    """To be told how much is done, and what should stand beside it."""

    def __call__(self, done: int, note: str = "") -> None: ...


_QUIET = 1.0  # seconds that need no word
_LINES_APART = 10.0


@contextmanager
def progress(what: str, total: int, *, bytes: bool = False) -> Iterator[Tell]:
    """Gives a function to be told how much of `total` is done. All on stderr, so that stdout holds results alone."""
    shown = _Shown(what, total, bytes)
    try:
        yield shown.tell
    finally:
        shown.close()


class _Shown:
    def __init__(self, what: str, total: int, bytes: bool) -> None:
        self.what, self.total, self.bytes = what, total, bytes
        self.began = self.spoke = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def tell(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"{self.what} {note}".rstrip())
        elif now - self.began > _QUIET and sys.stderr.isatty():
            self._draw(done)
        elif now - self.spoke > _LINES_APART:
            self.spoke = now
            left = (now - self.began) * (self.total - done) / max(done, 1)
            print(
                f"{self.what}: {100 * done / max(self.total, 1):.0f} %, {left:.0f} s left{note and f', {note}'}",
                file=sys.stderr,
            )

    def _draw(self, done: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        rate = (
            (DownloadColumn(), TransferSpeedColumn())
            if self.bytes
            else (
                MofNCompleteColumn(),
                TaskProgressColumn(show_speed=True),
            )
        )
        text = TextColumn("{task.description}")
        self.bar = Progress(text, BarColumn(), *rate, TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task(self.what, total=self.total, completed=done)
        self.bar.start()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
