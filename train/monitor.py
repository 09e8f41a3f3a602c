"""What a run tells: metrics.jsonl, TensorBoard, a progress bar on a terminal and plain lines elsewhere."""

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.runs import Run
from vlm.errors import DiskFullError, disk_full, room_for

PLAIN_EVERY_SECONDS = 10.0


class Monitor:
    """Use as a context manager. `quiet` (ranks other than 0) shows and writes nothing."""

    def __init__(self, run: Run, quiet: bool = False) -> None:
        self.run, self.quiet = run, quiet
        self.console = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.stage, self.total, self.done, self.last_line = "", 0, 0, 0.0

    def __enter__(self) -> "Monitor":
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run.folder / "tensorboard"
        with ExitStack() as opened:
            opened.enter_context(told_once())
            with room_for(folder):
                self.board = None if self.quiet else SummaryWriter(str(folder))
            self.opened = opened.pop_all()
        self.progress.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.progress.stop()
        with self.opened:
            if self.board is None:
                return
            try:
                with room_for(self.run.folder / "tensorboard"):
                    self.board.close()
            except DiskFullError:
                if error is None:  # else the run ends by what came first
                    raise

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, stage: str, total: int, done: int, manifest: list[tuple[str, int, float]]) -> None:
        """A new stage: its manifest of what learns, then its bar. total, done: steps, or samples of so many epochs."""
        table = Table(title=f"stage {stage}", title_justify="left")
        for column in ("part", "parameters", "learning rate"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for part, size, rate in manifest:
            table.add_row(part, f"{size:,}", f"{rate:g}" if rate else "frozen")
        self.console.print(table)
        self.stage, self.total, self.done = stage, total, done
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(stage, total=total, completed=done, shown="")

    def end(self, *lines: str | None) -> None:
        """The stage is over: says `lines`, and how many rows were not learned from whole, in what was logged of it."""
        if self.quiet:
            return
        for line in filter(None, lines):
            self.say(line)
        entries = [entry for entry in self.run.metrics() if entry["stage"] == self.stage]
        rows = list(dict.fromkeys(where for entry in entries for where in entry.get("shortened", ())))
        if rows:
            self.say(
                f"{self.stage}: rows that were too long and lost their end: {len(rows)} (the first is {rows[0]}; "
                f'"shortened" in {self.run.metrics_file} has all of them)'
            )

    def log(self, entry: dict[str, Any], done: int) -> None:
        """One finished step: a line of metrics.jsonl, a point on every curve. done: of the stage's total."""
        if self.board is None:
            return
        self.run.log(entry)
        with room_for(self.run.folder / "tensorboard"):
            for name, value in entry.items():
                if isinstance(value, float) and math.isfinite(value):
                    self.board.add_scalar(name, value, entry["step"])
        loss = "skipped" if entry.get("skipped") else f"loss {entry['loss']:.4f}"
        shown = f"{loss}  {entry['tokens_per_second']:,.0f} tok/s"
        if self.task is not None:
            self.progress.update(self.task, completed=done, shown=shown)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > PLAIN_EVERY_SECONDS or done == self.total):
            self.last_line = now
            left = (self.total - done) * entry["seconds"] / max(1, done - self.done)
            print(f"{self.stage} {done}/{self.total}  {shown}  {left:.0f} s left", file=sys.stderr, flush=True)
        self.done = done


@contextmanager
def told_once() -> Iterator[None]:
    """For full disks. TensorBoard writes in a thread of its own and raises what failed there again at the next call, so
    that the thread's own traceback says nothing more."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is None or disk_full(failed.exc_value) is None:
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
