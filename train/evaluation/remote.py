"""Answers of a server that speaks OpenAI's chat completions: any URL, or vLLM started for the purpose."""

import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from data.pictures import ImageRef, load_image, read_bytes
from serve.child import end_with_parent
from train.evaluation.prompts import Prompt, Reply
from vlm.errors import UserError, first_line
from vlm.hub import fetch
from vlm.images import image_format

TRIES = 6
TIMEOUT = 600.0  # seconds for one answer
READY_WITHIN = 1800.0  # seconds that a server may take to load its model
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_OURS = (400, 413, 415, 422)  # of one question's; others are everyone's
_SENT = ("JPEG", "PNG", "GIF", "WEBP")  # as they are
_COMPLAINTS_APART = 30.0  # seconds


class RemoteModel:
    """Asks a server, `concurrency` questions at a time. Each question stands alone, so they may come in any order."""

    keeps_batches = False

    def __init__(
        self,
        url: str,
        model: str | None,
        max_tokens: int,
        concurrency: int,
        api_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """url: with or without /v1; model: one that it serves, by default its only one; extra: of every request."""
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UserError("the API key has characters that no key has: a line end, or a letter with an accent")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(TIMEOUT, connect=30.0), limits=limits)
        self.concurrency, self.stopped = concurrency, Event()
        self.complained = -_COMPLAINTS_APART
        self.name = self._find(model)
        self.settings = {"temperature": 0, "max_tokens": max_tokens, **(extra or {})}

    def _find(self, model: str | None) -> str:
        told = self._request("GET", "/models", tries=2)
        try:
            served = [str(row["id"]) for row in told["data"]]
        except (KeyError, TypeError):
            raise UserError(f"{self.url}/models: names no models; is it an OpenAI API?") from None
        if model in served:
            return str(model)
        if model is None and len(served) == 1:
            return served[0]
        raise UserError(f"{self.url}: serves {', '.join(served) or 'nothing'}, and no {model}; name one as MODEL")

    def replies(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Reply]]:
        """Answers as they come. Whoever stops listening leaves what is under way behind."""
        todo: SimpleQueue[Prompt | None] = SimpleQueue()
        done: SimpleQueue[Reply | BaseException] = SimpleQueue()
        self.stopped = Event()
        # daemons, which a process that ends doesn't wait for: a server may take minutes to answer, or never do
        for _ in range(self.concurrency):
            Thread(target=self._work, args=(todo, done, self.stopped), daemon=True).start()
        waiting = 0
        try:
            for prompt in (prompt for batch in batches for prompt in batch):
                todo.put(prompt)
                waiting += 1
                if waiting >= 2 * self.concurrency:
                    yield [_taken(done)]
                    waiting -= 1
            for _ in range(waiting):
                yield [_taken(done)]
        except BaseException:
            self.stopped.set()
            raise
        finally:
            for _ in range(self.concurrency):
                todo.put(None)

    def _work(
        self, todo: "SimpleQueue[Prompt | None]", done: "SimpleQueue[Reply | BaseException]", stopped: Event
    ) -> None:
        while (prompt := todo.get()) is not None and not stopped.is_set():
            try:
                done.put(self._reply(prompt))
            except BaseException as error:  # told by whoever takes it
                done.put(error)

    def _reply(self, prompt: Prompt) -> Reply:
        try:
            messages = self._messages(prompt)
        except UserError as error:
            return Reply.failed(prompt, error)
        body = {"model": self.name, "messages": messages, **self.settings}
        try:
            told = self._request("POST", "/chat/completions", body)
        except RefusedError as error:
            return Reply.failed(prompt, error)
        except BusyError as error:
            self._check_health(error)
            return Reply.failed(prompt, error)
        try:
            text = told["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url}: no answer of chat completions: {json.dumps(told)[:200]}") from None
        if not isinstance(text, str):
            return Reply.failed(prompt, f"the server gave no text but {text!r:.40}")
        return Reply(prompt.id, text.encode(errors="replace").decode().strip())

    def _check_health(self, error: UserError) -> None:
        """Raises it unless the server answers a question that nobody can fail at: then it's this one's fault."""
        greeting = {"model": self.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            self._request("POST", "/chat/completions", greeting, tries=1)
        except RefusedError:
            pass  # which is an answer, too
        except UserError:
            raise UserError(f"{error}; what is answered already is kept") from None

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        messages = prompt.messages()
        images = iter(prompt.images)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["type"], part["image_url"] = "image_url", {"url": data_url(next(images))}
        return messages

    def _request(self, method: str, path: str, body: Any = None, tries: int = TRIES) -> Any:
        """RefusedError for what is wrong with this request alone, UserError for what would fail all others, too;
        BusyError where nobody knows, since no try was answered."""
        import httpx

        for attempt in range(1, tries + 1):
            asked_for = None
            try:
                timeout = httpx.USE_CLIENT_DEFAULT if method == "POST" else 30.0
                response = self.client.request(method, self.url + path, json=body, timeout=timeout)
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {first_line(error)}"
            else:
                if response.is_success:
                    return self._read(response)
                why = f"{response.status_code}: {_message(response)}"
                if response.status_code in _OURS:
                    raise RefusedError(why)
                if response.status_code not in _AGAIN:
                    raise UserError(f"{self.url}{path}: {why}")
                asked_for = response.headers.get("retry-after")
            if attempt < tries:
                self._complain(f"{why}; asking again ({attempt + 1} of {tries})")
                self.stopped.wait(pause(attempt, asked_for))
        raise BusyError(f"{self.url}{path}: {why} ({tries} tries)")

    def _complain(self, what: str) -> None:
        """Says why nothing comes; for all threads together, now and then."""
        now = time.monotonic()
        if now - self.complained > _COMPLAINTS_APART:
            self.complained = now
            print(f"{self.url}: {what}", file=sys.stderr)

    def _read(self, response: Any) -> Any:
        try:
            return response.json()
        except ValueError:
            raise UserError(f"{self.url}: answers with something else than JSON; is it an OpenAI API?") from None


def pause(attempt: int, asked_for: str | None) -> float:
    """Seconds before the next try: what the server asks for, or longer each time and never the same for all."""
    if asked_for is not None and asked_for.isdecimal():
        return min(float(asked_for), 120.0)
    return min(30.0, 0.5 * 2.0**attempt) * (0.5 + random.random())


def _taken(done: "SimpleQueue[Reply | BaseException]") -> Reply:
    found = done.get()
    if isinstance(found, BaseException):
        raise found
    return found


class BusyError(UserError):
    """The server has not answered this request, however often it was asked."""


class RefusedError(Exception):
    """The server won't answer this request."""


def data_url(image: ImageRef) -> str:
    """The image's own bytes, so that the server decodes what we would; a PNG of the same pixels where the format is one
    that OpenAI's API doesn't take. UserError if they are no image."""
    data = read_bytes(image)
    kind = image_format(data, str(image))
    if kind not in _SENT:
        png = io.BytesIO()
        load_image(image).save(png, "PNG")
        data, kind = png.getvalue(), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def _message(response: Any) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:200] or "no reason given"


@contextmanager
def launched_vllm(model: str, python: str | None, dtype: str, flags: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a vLLM server that is started for as long as it's needed; what it says goes to `log`."""
    command = [sys.executable, "-P", "-m", "vlm.cli", "serve", str(fetch(model)), "--engine", "vllm", "--port", "0"]
    command += ["--name", "evaluated", "--dtype", dtype, *(["--vllm-python", python] if python else [])]
    environment = {name: value for name, value in os.environ.items() if name != "VLM_API_KEY"}
    with log.open("wb") as told:
        server = subprocess.Popen(
            [*command, "--", *flags],
            stdout=told,
            stderr=told,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            yield _wait_until_ready(server, log)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_ready(server: "subprocess.Popen[bytes]", log: Path) -> str:
    import httpx

    until = time.monotonic() + READY_WITHIN
    while time.monotonic() < until:
        told = log.read_text(encoding="utf-8", errors="replace")
        if server.poll() is not None:
            lines = told.strip().splitlines() or ["it said nothing"]
            ours = [line for line in lines if line.startswith("vlm serve: ")]
            raise UserError(f"vLLM didn't start: {(ours or lines)[-1].removeprefix('vlm serve: ')} (all of it: {log})")
        if found := re.search(r"will be served at (http://\S+:\d+)", told):
            try:
                if httpx.get(f"{found[1]}/health", timeout=5).is_success:
                    return found[1]
            except httpx.TransportError:
                pass  # not yet
        time.sleep(0.5)
    raise UserError(f"vLLM was not ready after {READY_WITHIN / 60:.0f} minutes (what it said: {log})")


def default_key(api_key: str | None) -> str | None:
    found = api_key or os.environ.get("VLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return found.strip() if found else None
