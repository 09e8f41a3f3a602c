"""The self-test before vLLM's server, over a fake of it in a real uvicorn: who doesn't pass serves nobody."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from serve.server import bind
from serve.vllm_plugin.guard import ServerGuard
from serve.vllm_plugin.names import SELF_TEST, VERDICT
from serve.vllm_plugin.startup import has_self_test
from tests.serve.helpers import CHAT, wait_until
from tests.serve.test_vllm_launch import fake, serve, told  # noqa: F401 (a fixture)
from vlm import UserError, self_test
from vlm.self_test import SelfTest

Answered = Callable[[SelfTest], Any]
Start = Callable[..., tuple["Fake", int | None, str]]


class Fake:
    """A server that answers the test question as it is told to."""

    def __init__(self, answer: Answered, test: SelfTest, **served: Any) -> None:
        self.answer, self.test = answer, test
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.early: list[bool] = []  # whether somebody could connect while the test was made
        self.ended = False
        routes = [Route(CHAT, self.chat, methods=["POST"]), Route("/health", lambda _: PlainTextResponse("well"))]
        app = Starlette(routes=routes, lifespan=self.lifespan, middleware=[Middleware(ServerGuard)])
        settings = {"dtype": "torch.float32", "quantization": None, "cache": "auto", "keys": None, **served}
        app.state.args = SimpleNamespace(api_key=settings["keys"])
        app.state.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=settings["dtype"], quantization=settings["quantization"]),
            cache_config=SimpleNamespace(cache_dtype=settings["cache"]),
        )
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))

    @asynccontextmanager
    async def lifespan(self, _: Any) -> Any:
        yield
        self.ended = True

    async def chat(self, request: Any) -> Any:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        with socket.socket() as client:
            self.early.append(client.connect_ex(("127.0.0.1", self.port)) == 0)
        answer = self.answer(self.test)
        if isinstance(answer, Exception):
            raise answer
        return JSONResponse(answer, 400 if "error" in answer else 200)

    def run(self) -> int | None:
        """The code that the process would end with; None when the server started (and was asked for its health)."""
        refused = threading.Event()

        def ask() -> None:
            wait_until(lambda: self.server.started or refused.is_set(), seconds=10)
            if not refused.is_set():
                self.health = httpx.get(f"http://127.0.0.1:{self.port}/health").text
            self.server.should_exit = True

        client = threading.Thread(target=ask)
        client.start()
        code = None
        with self.listener:
            try:
                asyncio.run(self.server.serve(sockets=[self.listener]))
            except SystemExit as ended:
                code = int(str(ended.code))
                refused.set()
        client.join()
        return code


def well(test: SelfTest, shift: float = 0.0, tokens: int = 0) -> dict[str, Any]:
    content = [
        {
            "token": f"token_id:{step[0][0]}",
            "logprob": step[0][1],
            "top_logprobs": [{"token": f"token_id:{token}", "logprob": value + shift} for token, value in step],
        }
        for step in test.steps
    ]
    return {"usage": {"prompt_tokens": test.prompt_tokens + tokens}, "choices": [{"logprobs": {"content": content}}]}


@pytest.fixture
def start(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Fake, int | None, str]]:
    """(answer, **served) -> the server, its exit code, and the verdict."""
    folder = tiny_models("deep", "mlp")
    monkeypatch.setenv(SELF_TEST, str(folder))
    monkeypatch.setenv(VERDICT, str(tmp_path / "verdict"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    test = self_test.read(folder)
    assert test is not None

    def run(answer: Answered = well, **served: Any) -> tuple[Fake, int | None, str]:
        server = Fake(answer, test, **served)
        code = server.run()
        verdict = tmp_path / "verdict"
        return server, code, verdict.read_text() if verdict.is_file() else ""

    return run


def test_a_model_that_answers_as_it_did_is_served(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server, code, verdict = start()
    assert (code, verdict, server.health, server.early) == (None, "", "well", [False])
    assert server.ended, "the server's own end is not passed on"
    (asked,) = server.asked
    picture, text = asked["messages"][0]["content"]
    assert picture["image_url"]["url"] == server.test.picture
    assert text["text"] == server.test.text
    assert (asked["temperature"], asked["max_tokens"]) == (0, len(server.test.steps))
    assert "self-test: the model answers as when it was saved" in capsys.readouterr().out


def explodes(_: SelfTest) -> Exception:
    return RuntimeError("at /home/me/secret")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda test: well(test, shift=0.03), "log-probabilities are 0.03 apart, and rounding makes up to 0.02"),
        (lambda test: well(test, tokens=-3), "tokens instead of"),
        (
            lambda _: {"error": {"message": "at most 0 images"}},
            "refuses the model's test question (400: at most 0 images)",
        ),
        (explodes, "500: the server failed on this request"),
        (lambda _: {"choices": []}, "the self-test could not be made"),
    ],
)
def test_who_answers_differently_serves_nobody(start: Start, answer: Answered, said: str) -> None:
    server, code, verdict = start(answer)
    assert code not in (0, None)
    assert said in verdict
    refused = "refuses" in verdict  # which no new test could mend
    assert ("vlm export MODEL --to vlm" in verdict) != refused
    assert ("leave out the flag" in verdict) == refused
    assert "--skip-self-test" in verdict
    assert (server.early, hasattr(server, "health")) == ([False], False)
    assert server.ended, "the application is left running"


@pytest.mark.parametrize(
    ("served", "shift"),
    [
        ({"dtype": "torch.bfloat16"}, 0.2),
        ({"dtype": "torch.float16"}, 0.2),
        ({"quantization": "fp8"}, 1.0),
        ({"cache": "fp8_e4m3"}, 1.0),
    ],
)
def test_coarser_number_formats_may_differ_more(start: Start, served: dict[str, Any], shift: float) -> None:
    assert start(lambda test: well(test, shift=shift), **served)[1] is None
    assert start(lambda test: well(test, shift=shift))[1] is not None


def test_the_test_brings_the_key(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start()[0].keys == [None]
    assert start(keys=["theirs"])[0].keys == ["Bearer theirs"]
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert start()[0].keys == ["Bearer sesame"]


def test_without_a_test_the_server_starts_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SELF_TEST)
    server, code, _ = start(explodes)
    assert (code, server.asked, server.health) == (None, [], "well")


def test_the_launcher_names_the_test_and_tells_the_verdict(
    tiny_models: Any,
    fake: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_models("early", "mlp")
    monkeypatch.setenv(SELF_TEST, "/another")
    assert serve(folder, fake) == 7
    assert told(fake)["environment"][SELF_TEST] == str(folder.resolve())
    assert serve(folder, fake, "--skip-self-test") == 7
    assert SELF_TEST not in told(fake)["environment"]
    assert "self-test: skipped" in capsys.readouterr().out
    script = fake.read_text().replace(
        "sys.exit(7)", f"open(os.environ['{VERDICT}'], 'w').write('it differs')\nsys.exit(3)"
    )
    fake.write_text(script)
    assert serve(folder, fake) == 1
    assert capsys.readouterr().err.endswith(f"{folder}: it differs\n")


def test_a_folder_without_a_test_is_served_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not has_self_test(tmp_path, "cats", skip=False)
    assert "cats has no self_test.json" in capsys.readouterr().out
    (tmp_path / self_test.FILE).write_text(json.dumps({"version": 9}))
    with pytest.raises(UserError, match="version 9"):
        has_self_test(tmp_path, "cats", skip=False)
    assert not has_self_test(tmp_path, "cats", skip=True)
