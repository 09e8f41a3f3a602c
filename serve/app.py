"""The HTTP application: OpenAI's routes over an engine."""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.answers import Answer, TokenNames
from serve.engine import Delta, Deltas, Engine
from serve.engine import Request as EngineRequest
from serve.errors import ApiError, EngineError, as_api_error, is_draining
from serve.guard import Guard
from serve.media import AbandonedError, ChatPrompt, Limits, PromptBuilder, parse_json
from serve.protocol import ChatBody, CompletionBody, parse_body
from serve.transport import BodyBudget, EventStream, Traffic, error_response, unless_disconnected
from vlm import UserError, VisionLanguageProcessor
from vlm.threads import usable_cores

PAGE = Path(__file__).parent / "page" / "index.html"
# the page's own script and style, pictures that were dropped on it, and this server: nothing else
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """Answers completions. Reading and decoding happen in a few threads of their own, the engine in its one."""

    def __init__(
        self, engine: Engine, processor: VisionLanguageProcessor, name: str, limits: Limits, traffic: Traffic
    ) -> None:
        self.engine, self.name, self.traffic = engine, name, traffic
        self.prompts = PromptBuilder(processor, engine.info.context_length, limits)
        self.names = TokenNames(processor.tokenizer)
        self.budget = BodyBudget(limits.body_bytes, 8 * limits.body_bytes, limits.body_seconds)
        self.pool = ThreadPoolExecutor(min(4, usable_cores()), thread_name_prefix="prepare")

    async def chat(self, http: Request) -> Response:
        return await self._answer(http, self._read_chat)

    async def complete(self, http: Request) -> Response:
        return await self._answer(http, self._read_completion)

    async def _answer(self, http: Request, read: "Reader") -> Response:
        self.traffic.enter()
        streams: list[Deltas] = []

        async def close() -> None:
            for stream in streams:
                await stream.aclose()
            self.traffic.leave()

        handed_over = False
        try:
            async with self.budget.body(http) as data:
                body, requests = await unless_disconnected(http, self._in_pool(read, data))
            for request in requests:
                streams.append(self.engine.submit(request))
            count = sum(request.n for request in requests)
            chat = isinstance(body, ChatBody)
            answer = Answer(self.name, count, chat, self.names, requests[0].sampling.logprobs)
            deltas = _in_order(streams, requests)
            if not body.stream:
                await unless_disconnected(http, _collect(answer, deltas))
                return JSONResponse(answer.whole())
            # errors until the first token still get a status of their own
            first = await unless_disconnected(http, anext(deltas))
            handed_over = True
            return EventStream(_events(answer, first, deltas, body.includes_usage), close)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if not handed_over:
                await close()

    async def _in_pool(self, read: "Reader", data: bytes) -> "tuple[ChatBody | CompletionBody, list[EngineRequest]]":
        abandoned = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, _contained, read, data, abandoned)
        finally:
            abandoned.set()

    def _read_chat(self, data: bytes, abandoned: threading.Event) -> tuple[ChatBody, list[EngineRequest]]:
        if abandoned.is_set():
            raise AbandonedError
        body = parse_body(ChatBody, parse_json(data))
        self._check_model(body.model)
        body.sampling(left=1)  # bounds are checked before any image is decoded
        prompt = self.prompts.chat(body.messages, abandoned)
        return body, [self._request(body, prompt)]

    def _read_completion(self, data: bytes, abandoned: threading.Event) -> tuple[CompletionBody, list[EngineRequest]]:
        if abandoned.is_set():
            raise AbandonedError
        body = parse_body(CompletionBody, parse_json(data))
        self._check_model(body.model)
        count, limit = len(body.prompts), self.engine.info.max_choices
        if not 1 <= count <= limit:
            raise ApiError(400, f"{count} prompts, where 1 to {limit} are taken", param="prompt")
        tokens = [self.prompts.text(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        return body, [self._request(body, ChatPrompt(ids, ())) for ids in tokens]

    def _request(self, body: ChatBody | CompletionBody, prompt: ChatPrompt) -> EngineRequest:
        sampling = body.sampling(left=self.engine.info.context_length - len(prompt.input_ids))
        return EngineRequest(
            id=uuid.uuid4().hex,
            input_ids=prompt.input_ids,
            images=prompt.images,
            sampling=sampling,
            n=1 if body.n is None else body.n,
            stream=bool(body.stream),
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise model_not_found(name)


Reader = Callable[[bytes, threading.Event], tuple[ChatBody | CompletionBody, list[EngineRequest]]]


def _contained(
    read: Reader, data: bytes, abandoned: threading.Event
) -> tuple[ChatBody | CompletionBody, list[EngineRequest]]:
    try:
        return read(data, abandoned)
    except StopIteration as error:  # which no future can hold: whoever awaits it would wait forever
        raise RuntimeError("a request could not be read") from error


# a choice of the answer, a delta of it, and whether its usage counts the prompt
Piece = tuple[int, Delta, bool]


async def _in_order(streams: list[Deltas], requests: list[EngineRequest]) -> AsyncIterator[Piece]:
    """Deltas of several requests, one request after another, with choices numbered over all of them."""
    offset = 0
    for stream, request in zip(streams, requests, strict=True):
        counted = False
        async for delta in stream:
            yield offset + delta.choice, delta, not counted
            counted = counted or delta.usage is not None
        offset += request.n


async def _collect(answer: Answer, deltas: AsyncIterator[Piece]) -> None:
    async for choice, delta, counts_prompt in deltas:
        answer.add(delta, choice, counts_prompt)


async def _events(
    answer: Answer, first: Piece, deltas: AsyncIterator[Piece], includes_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    for event in answer.opening():
        yield event
    piece: Piece | None = first
    while piece is not None:
        choice, delta, counts_prompt = piece
        answer.add(delta, choice, counts_prompt)
        chunk = answer.chunk(choice, delta)
        if chunk is not None:
            yield chunk
        try:
            piece = await anext(deltas, None)
        except EngineError as error:  # the status is sent already, so the error is an event
            known = as_api_error(error)
            assert known is not None
            yield known.body()
            return
    if includes_usage:
        yield answer.closing()


def model_not_found(name: str) -> ApiError:
    return ApiError(404, f"the model {name[:100]!r} does not exist", param="model", code="model_not_found")


def create_app(
    engine: Engine,
    processor: VisionLanguageProcessor,
    name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    max_requests: int = 256,
) -> FastAPI:
    """The application over a started engine. name: the model's, for clients; max_requests: answered at one time.

    `app.state.traffic` tells how many requests are under way, and stops taking more when its `draining` is set.
    """
    app = FastAPI(title="vlm", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    traffic = app.state.traffic = Traffic(max_requests)
    service = Service(engine, processor, name, limits or Limits(), traffic)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "vlm"}
    card["max_model_len"] = engine.info.context_length
    if api_key:
        app.add_middleware(Guard, api_key=api_key)

    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/completions", service.complete, methods=["POST"])

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> JSONResponse:
        if model != name:
            raise model_not_found(model)
        return JSONResponse(card)

    @app.get("/health")
    async def health() -> JSONResponse:
        if not engine.alive:
            raise ApiError(503, "the engine is not running", "server_error", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if traffic.draining or not engine.alive:
            raise is_draining()
        return JSONResponse({"status": "ready"})

    @app.get("/")
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(PAGE, media_type="text/html", headers=headers)

    for kind in (ApiError, UserError, EngineError, HTTPException, Exception):
        app.add_exception_handler(kind, _explain)
    return app


async def _explain(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        what = {404: "there is no such route", 405: f"{request.method} is not allowed here"}
        message = what.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return error_response(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))
    known = as_api_error(error)
    if known is None:  # the server logs the traceback
        known = ApiError(500, "the server failed on this request", "server_error", code="internal_error")
    return error_response(known)
