"""Evaluation through a URL: what is sent, what is tried again, whose failure is whose."""

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train.evaluation.remote as remote
from train.evaluation.prompts import Prompt, Turn
from train.evaluation.remote import RemoteModel
from vlm.cli import main
from vlm.errors import UserError

Answer = tuple[int, dict[str, Any], dict[str, str]]


class Fake:
    """An OpenAI server whose answers a test gives."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["demo"]
        self.answer: Callable[[dict[str, Any]], Answer] = lambda _: said("red")
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": name} for name in fake.models]}, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(body)
                fake.keys.append(self.headers["Authorization"])
                self._send(*fake.answer(body))

            def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


def said(text: str | None) -> Answer:
    return 200, {"choices": [{"message": {"content": text}}]}, {}


def refused(status: int, message: str, **headers: str) -> Answer:
    return status, {"error": {"message": message}}, headers


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(remote, "pause", lambda *_: 0.0)
    for name in ("VLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = Fake()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()


def prompts(count: int) -> list[list[Prompt]]:
    return [[Prompt(str(n), (Turn(f"what {n}?"),)) for n in range(count)]]


def replies(model: RemoteModel, batches: list[list[Prompt]]) -> dict[str, tuple[str | None, str | None]]:
    return {reply.id: (reply.answer, reply.error) for some in model.replies(batches) for reply in some}


def test_the_prompt_is_sent_as_a_chat_with_the_pictures_own_bytes(fake: Fake, tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    turns = (Turn("first?", tmp_path / "a.png", "blue"), Turn("second?", tmp_path / "a.png"))
    model = RemoteModel(f"{fake.url}/v1/", "demo", 7, 2, "sesame", {"repetition_penalty": 1.0})
    assert replies(model, [[Prompt("a", turns)]]) == {"a": ("red", None)}
    body = fake.asked[0]
    assert {key: body[key] for key in body if key != "messages"} == {
        "model": "demo",
        "temperature": 0,
        "max_tokens": 7,
        "repetition_penalty": 1.0,
    }
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    image, text = body["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == data.getvalue()
    assert text == {"type": "text", "text": "first?"}
    assert fake.keys == ["Bearer sesame"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_of_a_format_that_servers_do_not_take_is_sent_as_png(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.image"
    Image.effect_noise((9, 7), 90).convert("RGB").save(path, kind)
    head, _, data = remote.data_url(path).partition(";base64,")
    kept = kind in ("JPEG", "PNG", "GIF", "WEBP")
    assert head == f"data:image/{kind.lower() if kept else 'png'}"
    assert (base64.b64decode(data) == path.read_bytes()) is kept
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent, Image.open(path) as ours:
        assert sent.convert("RGB").tobytes() == ours.convert("RGB").tobytes()


def test_a_busy_server_is_asked_again_and_a_refused_question_fails_alone(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = iter([refused(429, "full", **{"Retry-After": "3"}), refused(503, "draining"), refused(500, "oh")])

    def answer(body: dict[str, Any]) -> Answer:
        if body["messages"][0]["content"][0]["text"] == "what 3?":
            return refused(400, "too long for the context")
        return next(busy, said(" red \n"))

    fake.answer = answer
    told = replies(RemoteModel(fake.url, None, 7, 4), prompts(20))
    assert told.pop("3") == (None, "400: too long for the context")
    assert set(told.values()) == {("red", None)}
    assert len(fake.asked) == 23
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 1
    assert re.fullmatch(rf"{fake.url}/v1: (429: full|503: draining|500: oh); asking again \(2 of 6\)", complaints[0])


def test_a_question_that_the_server_always_fails_at_fails_alone(fake: Fake) -> None:
    poison = "what 3?"

    def answer(body: dict[str, Any]) -> Answer:
        asked = body["messages"][0]["content"]
        return refused(500, "oh \ud800 no") if asked[0] != "H" and asked[0]["text"] == poison else said("red")

    fake.answer = answer
    told = replies(RemoteModel(fake.url, None, 7, 1), prompts(6))
    assert told.pop("3")[1] == f"{fake.url}/v1/chat/completions: 500: oh ? no (6 tries)"
    assert set(told.values()) == {("red", None)}
    assert len(fake.asked) == 5 + remote.TRIES + 1


@pytest.mark.parametrize("key", ["a\nb", "schl\u00fcssel"])
def test_a_key_that_is_none_is_not_sent_nor_shown(fake: Fake, key: str) -> None:
    with pytest.raises(UserError, match="the API key has characters that no key has") as told:
        RemoteModel(fake.url, "demo", 7, 1, key)
    assert key not in str(told.value)


def test_a_server_is_waited_for_as_long_as_what_is_asked_may_take(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    model, waited = RemoteModel(fake.url, "demo", 7, 1), {}

    def send(request: Any, **_: Any) -> None:
        waited[request.method] = request.extensions["timeout"]
        raise KeyboardInterrupt

    monkeypatch.setattr(model.client, "send", send)
    for method in ("GET", "POST"):
        with pytest.raises(KeyboardInterrupt):
            model._request(method, "/models")
    assert (waited["POST"]["connect"], waited["POST"]["read"], waited["GET"]["read"]) == (30, remote.TIMEOUT, 30)


def test_the_key_of_a_file_may_have_its_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\r\n")
    monkeypatch.delenv("VLM_API_KEY", raising=False)
    assert remote.default_key(None) == "sesame"


def test_what_would_fail_every_question_ends_the_run(fake: Fake) -> None:
    for status in (401, 404):
        fake.answer = lambda _, status=status: refused(status, "no such door")  # type: ignore[misc]
        with pytest.raises(UserError, match=rf"/v1/chat/completions: {status}: no such door"):
            replies(RemoteModel(fake.url, "demo", 7, 4), prompts(3))
    fake.answer = lambda _: refused(503, "loading")
    with pytest.raises(UserError, match=r"503: loading \(6 tries\); what is answered already is kept"):
        replies(RemoteModel(fake.url, "demo", 7, 1), prompts(1))
    fake.models = ["a", "b"]
    for wanted in ("demo", None):
        with pytest.raises(UserError, match=f"serves a, b, and no {wanted}; name one as MODEL"):
            RemoteModel(fake.url, wanted, 7, 4)
    fake.models = ["other"]
    with pytest.raises(UserError, match="serves other, and no demo"):
        RemoteModel(fake.url, "demo", 7, 4)
    fake.models = ["demo"]
    for odd in ({"choices": []}, {"error": {"message": "oh"}}, [], {"choices": [{"message": None}]}):
        fake.answer = lambda _, odd=odd: (200, odd, {})  # type: ignore[misc]
        with pytest.raises(UserError, match="no answer of chat completions: "):
            replies(RemoteModel(fake.url, "demo", 7, 1), prompts(1))
    fake.answer = lambda _: said(None)
    assert replies(RemoteModel(fake.url, "demo", 7, 1), prompts(1)) == {"0": (None, "the server gave no text but None")}
    with pytest.raises(UserError, match="Connection refused"):
        RemoteModel("http://127.0.0.1:9", "demo", 7, 4)


@pytest.mark.parametrize(("asked_for", "seconds"), [("7", 7), ("900", 120), ("Wed, 21 Oct 2026", None), (None, None)])
def test_the_pause_is_the_servers_or_grows(asked_for: str | None, seconds: float | None) -> None:
    for attempt in range(1, remote.TRIES):
        found = remote.pause(attempt, asked_for)
        longest = min(30.0, 0.5 * 2**attempt)
        assert found == seconds if seconds else 0.5 * longest <= found <= 1.5 * longest


def test_a_picture_that_is_none_fails_alone(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    told = replies(
        RemoteModel(fake.url, None, 7, 4), [[Prompt("a", (Turn("what?", tmp_path / "a.png"),)), *prompts(1)[0]]]
    )
    assert told["0"] == ("red", None)
    assert told["a"][1] is not None
    assert "a.png" in told["a"][1]


def test_a_url_is_an_engine(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": n, "question": f"what {n}?", "answer": "red" if n else "blue"} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fake.answer = lambda body: said("red") if len(fake.asked) > 1 else said("")
    command = ["eval", "demo", "--task", "exact", "--data", str(tmp_path / "q.jsonl"), "--engine", fake.url]
    assert main([*command, "--out", str(tmp_path / "out"), "--concurrency", "1"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["settings"]["engine"] == fake.url
    assert scores["settings"]["model_sha256"] is None
    assert {body["max_tokens"] for body in fake.asked} == {32}
    asked = len(fake.asked)
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert len(fake.asked) == asked
    assert main([*command, "--out", str(tmp_path / "other"), "--rank"]) == 1
    assert "--rank needs the probabilities of whole answers" in capsys.readouterr().err
