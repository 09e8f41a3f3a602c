"""Before vLLM's routes: the self-test, the key on every one but /health, errors in the shape of all our servers, no
paths."""

import json
import logging
import os
import re
from typing import Any

from serve.errors import ApiError, is_draining
from serve.guard import App, Guard, Message, Receive, Scope, Send
from serve.transport import error_response
from serve.vllm_plugin.startup import self_tested

log = logging.getLogger("serve.vllm_plugin.guard")
OPEN_PATHS = ("/health",)
MODELS = "/v1/models"
FAILED = "the server failed on this request"
CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    429: "queue_full",
    503: "unavailable",
}


class ServerGuard:
    """What `--middleware` names; key and test come by the environment."""

    def __init__(self, app: App) -> None:
        self.app: App = self_tested(Answers(app))
        key = os.environ.get("VLLM_API_KEY")
        if key:
            self.app = Guard(self.app, key, OPEN_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Answers:
    """Rewrites the bodies of answers with an error status (422 becomes 400), and where the list of models shows their
    folders. Everything else passes as it comes."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, lists_models=scope["path"] == MODELS)
        try:
            await self.app(scope, receive, answer)
        except Exception as error:  # what nobody expected; the framework outside of us would answer in its own shape
            if answer.started:
                raise
            told = is_draining()
            if "after shutdown" not in str(error):  # what Python says of a pool that takes no more work
                log.exception("a request failed", exc_info=error)
                told = ApiError(500, FAILED, "server_error", code="internal_error")
            await error_response(told)(scope, receive, send)


class _Answer:
    """One answer on its way out; what is rewritten is held back until it is whole."""

    def __init__(self, send: Send, lists_models: bool) -> None:
        self.send, self.lists_models = send, lists_models
        self.started, self.body = False, b""
        self.held: Message | None = None

    async def __call__(self, message: Message) -> None:
        self.started = True
        if message["type"] == "http.response.start" and (message["status"] >= 400 or self.lists_models):
            self.held = message
        elif self.held is None:
            await self.send(message)
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                data = _rewritten(self.held["status"], self.body)
                await self.send(_start(self.held, data))
                await self.send({"type": "http.response.body", "body": data})


def _start(message: Message, body: bytes) -> Message:
    replaced = (b"content-length", b"content-type")
    headers = [header for header in message["headers"] if header[0].lower() not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {**message, "status": 400 if message["status"] == 422 else message["status"], "headers": headers}


def _rewritten(status: int, body: bytes) -> bytes:
    if status >= 400:
        return json.dumps(_error(400 if status == 422 else status, body).body()).encode()
    cards = json.loads(body)
    for card in cards["data"]:
        card["root"] = card["id"]
    return json.dumps(cards).encode()


def _error(status: int, body: bytes) -> ApiError:
    """The error that vLLM, FastAPI or a middleware meant."""
    try:
        said: Any = json.loads(body)
    except ValueError:
        said = body.decode(errors="replace")
    if isinstance(said, dict):
        said = next((said[name] for name in ("error", "detail", "message") if name in said), said)
    told: dict[str, Any] = said if isinstance(said, dict) else {"message": str(said)}
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    message = re.sub(r" \(parameter=.*\)$", "", str(told.get("message") or FAILED))
    code = told.get("code")
    known = code if isinstance(code, str) else CODES.get(status)
    if status == 404 and told.get("param") == "model":
        known = "model_not_found"
    return ApiError(status, message, kind, param=told.get("param"), code=known)
