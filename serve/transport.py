"""Bytes in and out of HTTP: bodies with a bound, streams that end when the client goes."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError, is_draining, queue_is_full

T = TypeVar("T")


class Traffic:
    """How many requests are being answered, and whether more are taken."""

    def __init__(self, limit: int) -> None:
        self.limit, self.active, self.draining = limit, 0, False

    def enter(self) -> None:
        if self.draining:
            raise is_draining()
        if self.active >= self.limit:
            raise queue_is_full()
        self.active += 1

    def leave(self) -> None:
        self.active -= 1


class BodyBudget:
    """Bounds the size of every body and of all that are held at once, and the time that one may take to arrive."""

    def __init__(self, per_request: int, together: int, seconds: float) -> None:
        self.per_request, self.together, self.seconds = per_request, together, seconds
        self.held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, counted as held until the block ends.

        ApiError 413 over the bound, 408 when it takes too long to arrive, 429 when too much is held already.
        """
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.per_request and "expect" in request.headers:
            raise self._too_large()  # the client asks before it sends
        parts: list[bytes] = []
        try:
            await self._read(request, parts)
            yield b"".join(parts)
        finally:
            self.held -= sum(map(len, parts))

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.together:
                        break
                    if size > self.per_request:
                        continue  # most clients read no answer before they have sent everything
                    parts.append(part)
                    self.held += len(part)
                    if self.held > self.together:
                        raise queue_is_full()
        except TimeoutError:
            if size > self.per_request:
                raise self._too_large() from None
            message = f"the request took longer than {self.seconds:g} seconds to arrive"
            raise ApiError(408, message, code="upload_timeout", headers={"Connection": "close"}) from None
        if size > self.per_request:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = f"the body is over the limit of {self.per_request:,} bytes"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, cancelled when the client goes (ClientDisconnect). The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: every item is a JSON object, `[DONE]` ends them.

    `close` is awaited when all is sent or the client has gone, whether or not any event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            gone.cancel()
            if not writing.done():
                writing.cancel()
                await asyncio.wait({writing})
            await self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": encode_event(event), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def encode_event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)
