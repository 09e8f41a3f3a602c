"""Middleware before everything else: who may come in. Plain ASGI, so that it also fits before other servers."""

import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from serve.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/ready"})


class Guard:
    """Asks for `Authorization: Bearer KEY` on every path but the open ones. Paths are compared as they are routed."""

    def __init__(self, app: App, api_key: str, open_paths: Iterable[str] = OPEN_PATHS) -> None:
        self.app, self.open_paths = app, frozenset(open_paths)
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in self.open_paths):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if hmac.compare_digest(scheme.title() + b" " + key.strip(), self._expected):
            await self.app(scope, receive, send)
            return
        await _refuse(send, bool(given))


async def _refuse(send: Send, with_key: bool) -> None:
    from starlette.responses import JSONResponse

    message = "the API key is wrong" if with_key else "this server needs an API key: Authorization: Bearer KEY"
    error = ApiError(401, message, code="invalid_api_key")
    response = JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})
    await response({"type": "http"}, _nothing, send)


async def _nothing() -> Message:
    raise AssertionError("a plain response reads nothing")
