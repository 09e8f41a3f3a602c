"""Before vLLM's server takes requests it is asked what the model was asked when it was saved, and must say the same."""

import asyncio
import json
import logging
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from serve.guard import App, Message, Receive, Scope, Send
from serve.vllm_plugin.names import SELF_TEST, VERDICT
from vlm.errors import UserError, first_line
from vlm.self_test import FILE, Answer, SelfTest, check, read

log = logging.getLogger("serve.vllm_plugin.startup")
CHAT = "/v1/chat/completions"
MOST_LOGPROBS = 20  # vLLM's own limit, unless its --max-logprobs says otherwise
UNQUANTISED_CACHES = ("auto", "float16", "bfloat16", "float32")
SKIP = "--skip-self-test serves the model without one"
WAYS_OUT = f"what was changed on purpose gets a new test by vlm export MODEL --to vlm --out DIR, and {SKIP}"


class RefusedError(UserError):
    """The question itself, of which a new test wouldn't be better."""


def has_self_test(folder: Path, name: str, skip: bool) -> bool:
    """Whether the server has to pass the model's self-test. Where it hasn't, that is printed. UserError for a broken
    one, unless it is to be skipped."""
    if skip:
        print(f"self-test: skipped, so whether vLLM answers as {name} does isn't known", flush=True)
    elif read(folder) is None:
        print(
            f"self-test: {name} has no {FILE}, so whether vLLM answers as the model does isn't known; "
            "folders that vlm train and vlm export write have one",
            flush=True,
        )
    else:
        return True
    return False


class SelfTested:
    """The application's start succeeds when the test does. Until then the server listens to nobody: uvicorn waits for
    the start, and ends when it fails. What went wrong goes into a file, for the launcher to tell."""

    def __init__(self, app: App, test: SelfTest, verdict: Path) -> None:
        self.app, self.test, self.verdict = app, test, verdict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        failed = False

        async def receive_or_end() -> Message:
            return {"type": "lifespan.shutdown"} if failed else await receive()

        async def send_tested(message: Message) -> None:
            nonlocal failed
            if message["type"] == "lifespan.startup.complete" and (wrong := await self._wrong(scope)):
                failed = True  # the application has started, and now ends as if it had been asked to
                self.verdict.write_text(wrong, encoding="utf-8")
                message = {"type": "lifespan.startup.failed", "message": wrong}
            await send(message)

        await self.app(scope, receive_or_end, send_tested)

    async def _wrong(self, scope: Scope) -> str | None:
        """None when the model answers as it should."""
        try:
            answer = await _ask(self.app, scope, self.test)
            print(f"self-test: the model {check(self.test, answer, *_precision(scope))}", flush=True)
        except UserError as error:
            return f"{error}; {SKIP if isinstance(error, RefusedError) else WAYS_OUT}"
        except Exception as error:  # uvicorn would take this for an application that knows no start, and serve it
            log.exception("the self-test failed", exc_info=error)
            return f"the self-test could not be made ({first_line(error)}); {WAYS_OUT}"
        return None


def self_tested(app: App) -> App:
    """The application behind its test, where the launcher has named one."""
    folder = os.environ.get(SELF_TEST)
    test = read(Path(folder)) if folder else None
    return app if test is None else SelfTested(app, test, Path(os.environ[VERDICT]))


async def _ask(app: App, scope: Scope, test: SelfTest) -> Answer:
    """RefusedError when the server doesn't take it."""
    picture = {"type": "image_url", "image_url": {"url": test.picture}}
    status, body = await _post(
        app,
        scope,
        {
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": test.text}]}],
            "max_tokens": len(test.steps),
            "ignore_eos": True,
            "temperature": 0,
            "repetition_penalty": 1,  # a model's own default may be another
            "logprobs": True,
            "top_logprobs": MOST_LOGPROBS,
            "return_tokens_as_token_ids": True,
        },
    )
    if status != 200:
        told = f"{status}: {body['error']['message']}"
        raise RefusedError(f"the server refuses the model's test question ({told}); leave out the flag that does so")
    steps = [
        (_token(said), {_token(one): float(one["logprob"]) for one in said["top_logprobs"]})
        for said in body["choices"][0]["logprobs"]["content"]
    ]
    return Answer(body["usage"]["prompt_tokens"], tuple(steps))


def _token(entry: MutableMapping[str, Any]) -> int:
    return int(entry["token"].removeprefix("token_id:"))


def _precision(scope: Scope) -> tuple[str, bool]:
    config = scope["app"].state.vllm_config
    quantised = config.model_config.quantization is not None
    return (
        str(config.model_config.dtype).removeprefix("torch."),
        quantised or config.cache_config.cache_dtype not in UNQUANTISED_CACHES,
    )


async def _post(app: App, scope: Scope, body: dict[str, Any]) -> tuple[int, Any]:
    """A request made within the process: the status and the JSON of what the application answers."""
    keys = [os.environ.get("VLLM_API_KEY"), *(scope["app"].state.args.api_key or ())]  # the latter: of vLLM's own flag
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    headers += [(b"authorization", f"Bearer {key}".encode()) for key in keys[-1:] if key]
    asked = {
        **scope,
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    waiting: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    status, parts = 0, []

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()  # this client doesn't leave
        return waiting.pop()

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(asked, receive, send)
    return status, json.loads(b"".join(parts))
