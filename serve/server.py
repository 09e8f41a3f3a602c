"""Listening: a socket that is ours before the model loads, and a shutdown that finishes what was accepted."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from serve.transport import Traffic
from vlm.errors import UserError

log = logging.getLogger("serve.server")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet; port 0 takes a free one. UserError when the address can't be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise UserError(f"{host}:{port} is no address to listen on ({error})") from None
    family, kind, protocol, _, address = found[0]
    # accepted connections take its protocol over, and asyncio sets TCP_NODELAY only where that is TCP, not 0: without,
    # the second part of every answer waits 40 ms for the client's acknowledgement of the first
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _not_to_be_had(host, port, error) from None
    return listener


def listen(listener: socket.socket) -> None:
    """Takes connections from now on. UserError when another server was bound alike, and has begun to listen since."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise _not_to_be_had(host, port, error) from None


def _not_to_be_had(host: str, port: int, error: OSError) -> UserError:
    hint = "; choose another with --port" if error.errno in (98, 48, 10048) else ""
    return UserError(f"can't listen on {host}:{port}: {(error.strerror or str(error)).lower()}{hint}")


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT finishes what was accepted, refusing more; on the second stops at once."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, drain_timeout: float) -> None:
        super().__init__(config)
        self.traffic, self.drain_timeout = traffic, drain_timeout
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when it has shut down, and the process would not exit with 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(number: int, _frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.shut_down)

        earlier = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def shut_down(self) -> None:
        if self._draining is not None:
            self.force_exit = True
            self.should_exit = True
            return
        self.traffic.draining = True
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if self.traffic.active:
            log.warning("finishing %d requests; once more to stop at once", self.traffic.active)
        try:
            async with asyncio.timeout(self.drain_timeout):
                while self.traffic.active:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            log.warning("%d requests were not finished within %g seconds", self.traffic.active, self.drain_timeout)
        self.should_exit = True
