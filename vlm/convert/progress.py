"""Shards as they are written: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm.convert import tensors


@contextmanager
def shown(what: str) -> Iterator[tensors.Progress]:
    """What `write_tensors` tells its progress to. On stderr, so that stdout holds results alone."""
    console = Console(stderr=True)
    if not console.is_terminal:

        def tell(number: int, count: int, total: int) -> None:
            print(f"{what}: shard {number} of {count}, {total / 1e9:.2f} GB", file=sys.stderr)

        yield tell
        return
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, rate="")
        start = time.monotonic()

        def draw(number: int, count: int, total: int) -> None:
            seconds = max(time.monotonic() - start, 1e-3)
            bar.update(task, completed=number, total=count, rate=f"{total / seconds / 1e6:.0f} MB/s")

        yield draw
