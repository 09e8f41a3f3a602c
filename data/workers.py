"""Processes that do the same kind of work side by side; results come back in order, few at a time."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from vlm.errors import UserError

_worker: Any = None  # of this process, where it is one of a Workers' processes


class Workers:
    """`make()` is called once in each of `count` new processes; with 0 of them, all work is done here.

    make: a picklable callable that gives an object; its methods are then called by name.
    """

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        self.count = count
        self.local = make() if count == 0 else None
        self.pool: ProcessPoolExecutor | None = None
        if count:
            spawn = multiprocessing.get_context("spawn")  # the parent may have threads, and a device
            self.pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_start, initargs=(make,))

    def map(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """What `method` gives for each task's arguments, in order; no more tasks are drawn than the workers need."""
        if self.pool is None:
            yield from (getattr(self.local, method)(*task) for task in tasks)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(self._submit(method, task))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process has died, perhaps for want of memory; try fewer (--workers 1) or none (--workers 0)"
            ) from None

    def _submit(self, method: str, task: tuple[Any, ...]) -> Future[Any]:
        assert self.pool is not None
        # the first call starts the processes, which inherit this from their first moment on: the parent alone hears
        # Ctrl-C, and ends its workers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self.pool.submit(_call, method, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=kind is None, cancel_futures=True)
            if kind is not None:
                for process in multiprocessing.active_children():
                    process.terminate()


def _start(make: Callable[[], Any]) -> None:
    global _worker
    _worker = make()


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_worker, method)(*arguments)
