"""The server over real sockets: in a thread where a test looks behind it, as a process where signals matter."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace

import httpx
import openai
import pytest
import uvicorn

from serve.app import create_app
from serve.media import Limits
from serve.server import DrainingServer, bind, listen
from tests.serve.helpers import (
    CHAT,
    chat_body,
    data_url,
    endless,
    make_request,
    picture,
    run,
    slowly,
    spoiled,
    wait_until,
)
from vlm.errors import UserError


@contextmanager
def listening(app):
    """The app on a free port, in a thread; gives its URL."""
    listener = bind("127.0.0.1", 0)
    server = DrainingServer(uvicorn.Config(app, lifespan="off", log_level="warning"), app.state.traffic, 5.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def process(folder, *options):
    """`vlm serve` on a free port; gives the process and its URL."""
    command = [sys.executable, "-m", "vlm.cli", "serve", str(folder), "--port", "0", "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLM_API_KEY": "sesame"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = running.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, (line, running.communicate())
        yield running, found[0]
    finally:
        running.kill()
        running.communicate()


def body(text="what is it?", **settings):
    return chat_body(text, temperature=0, model=None, **settings)


@pytest.fixture
def slow(make_engine, loaded):
    """An engine whose steps take 10 ms, and settings under which an answer takes seconds."""
    engine = make_engine(max_batch=2)
    ban = {str(token): bias for token, bias in endless(loaded()[1])["logit_bias"].items()}
    with spoiled(engine.runner, "decode", slowly(engine.runner.decode)):
        yield engine, {"logit_bias": ban, "max_tokens": 450}


def test_the_openai_client_gets_answers_and_errors(tiny_models):
    question = [
        {"type": "text", "text": "what colour?"},
        {"type": "image_url", "image_url": {"url": data_url(picture(1), "JPEG")}},
    ]
    asked = {"model": "model", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
    with (
        process(tiny_models("deep", "perceiver")) as (_, url),
        openai.OpenAI(base_url=url + "/v1", api_key="sesame") as client,
    ):
        assert [card.id for card in client.models.list()] == ["model"]
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        assert client.completions.create(model="model", prompt="one", max_tokens=3).usage.completion_tokens in (1, 2, 3)
        with pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 2"):
            client.chat.completions.create(**{**asked, "temperature": 3})
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(**{**asked, "model": "other"})
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(tiny_models):
    request = body("on and on", stream=True, max_tokens=480, logit_bias={"1": -100})
    headers = {"Authorization": "Bearer sesame"}
    with process(tiny_models("early", "mlp")) as (running, url), httpx.Client(base_url=url, headers=headers) as client:
        refused = None
        with client.stream("POST", CHAT, json=request) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            received = []
            for line in lines:
                received.append(line)
                if refused is None or refused == 200:
                    refused = httpx.get(url + "/ready", timeout=5).status_code
                    late = httpx.post(url + CHAT, json=body(), headers=headers, timeout=5) if refused == 503 else None
        assert (refused, late.status_code) == (503, 503)
        assert late.json()["error"]["code"] == "draining"
        assert received[-2] == "data: [DONE]"
        last = json.loads([line for line in received if line.startswith("data: {")][-1][6:])
        assert last["choices"][0]["finish_reason"] == "length"
        assert running.wait(timeout=10) == 0
        assert running.stderr.read().count("Traceback") == 0


def test_a_port_in_use_is_said_before_the_model_loads(tmp_path):
    from serve.commands import run_serve
    from vlm.cli import main, parse

    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = parse(["serve", str(tmp_path / "no-such-model"), "--port", str(port)])
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}.*in use.*--port"):
            run_serve(options)
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
    with pytest.raises(UserError, match="no address"):
        bind("no.such.host.invalid", 80)


def test_of_two_servers_that_start_together_the_later_says_that_the_port_is_in_use():
    with closing(bind("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with closing(bind("127.0.0.1", port)) as second:
            listen(first)
            with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}.*in use.*--port"):
                listen(second)


def test_answers_on_a_kept_alive_connection_take_the_engines_time_and_no_more(make_engine, loaded):
    """A connection without TCP_NODELAY adds 40 ms to every answer but the first. The least of many tries, as this
    machine may be busy."""
    engine, processor = make_engine(), loaded()[1]
    request = make_request(processor, "what is it?", max_tokens=4)

    def least(work, tries=12):
        seconds = []
        for _ in range(tries):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    alone = least(lambda: run(engine, replace(request, id=f"{random.random()}")))
    with listening(create_app(engine, processor, "tiny")) as url, httpx.Client(base_url=url) as client:

        def ask():
            assert client.post(CHAT, json=body(max_tokens=4)).status_code == 200

        over_http = least(ask)
    assert over_http < alone + 0.03, (over_http, alone)


def test_a_streams_first_token_does_not_wait_for_its_last(make_engine, loaded):
    """Without TCP_NODELAY the first of 48 quick tokens arrives with the last, once the client has acknowledged."""
    engine, processor = make_engine(), loaded()[1]
    ban = {str(token): bias for token, bias in endless(processor)["logit_bias"].items()}
    asked = body(max_tokens=48, logit_bias=ban, stream=True)
    shares = []
    with listening(create_app(engine, processor, "tiny")) as url, httpx.Client(base_url=url) as client:
        for _ in range(6):  # the first answer on a connection is sent at once in any case, and the machine may be busy
            began, arrived = time.perf_counter(), []
            with client.stream("POST", CHAT, json=asked) as stream:
                for line in stream.iter_lines():
                    if "content" in line:
                        arrived.append(time.perf_counter() - began)
            shares.append(arrived[1] / arrived[-1])
    assert min(shares[1:]) < 0.4, shares


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(slow, loaded, stream):
    engine, settings = slow
    with listening(create_app(engine, loaded()[1], "tiny")) as url:
        asked = {"json": body(**settings, stream=stream), "timeout": 0.3}
        if stream:
            with httpx.stream("POST", url + CHAT, **asked) as response:
                next(response.iter_lines())
                assert engine.scheduler.running
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + CHAT, **asked)
        wait_until(lambda: engine.scheduler.idle, seconds=1.0)
        assert httpx.post(url + CHAT, json=body(max_tokens=2)).status_code == 200


def test_a_client_that_goes_while_its_images_are_read_never_reaches_the_engine(make_engine, loaded):
    engine, processor = make_engine(), loaded()[1]
    app = create_app(engine, processor, "tiny")
    images = [{"type": "image_url", "image_url": {"url": data_url(picture(i))}} for i in range(30)]
    read = []

    def slow_pixels(pictures):
        read.append(len(pictures))
        time.sleep(0.1)
        return original(pictures)

    original = processor.pixels
    submitted = []
    submit = engine.submit
    with (
        listening(app) as url,
        spoiled(processor, "pixels", slow_pixels),
        spoiled(engine, "submit", lambda request: submitted.append(request) or submit(request)),
    ):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + CHAT, json=body(images), timeout=0.25)
        wait_until(lambda: app.state.traffic.active == 0)
        time.sleep(0.25)
        seen = len(read)
        time.sleep(0.25)
        assert len(read) == seen < 30
        assert submitted == []


def test_a_client_that_goes_while_sending_leaves_nothing(make_engine, loaded):
    app = create_app(make_engine(), loaded()[1], "tiny")
    with listening(app) as url:
        port = int(url.rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port))) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            wait_until(lambda: app.state.traffic.active == 1)
        wait_until(lambda: app.state.traffic.active == 0)
        assert httpx.post(url + CHAT, json=body()).status_code == 200


def test_slow_and_large_uploads_are_cut_off_with_an_answer(make_engine, loaded):
    app = create_app(make_engine(), loaded()[1], "tiny", limits=Limits(body_bytes=1_000_000, body_seconds=1.0))
    with listening(app) as url:
        size = 7_500_000
        for sent in (size, 0):  # who asks before sending is refused without having sent
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
            head += "" if sent else "Expect: 100-continue\r\n"
            with closing(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))) as connection:
                connection.sendall(f"{head}\r\n".encode() + b"x" * sent)
                assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        # far beyond the limit the connection is closed, so that the client may not see the answer
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            response = httpx.post(url + CHAT, content=itertools.repeat(b"x" * 100_000))
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

        def drip():
            for _ in range(60):
                yield b" "
                time.sleep(0.05)

        response = httpx.post(url + CHAT, content=drip())
        assert (response.status_code, response.json()["error"]["code"]) == (408, "upload_timeout")
        assert app.state.traffic.active == 0
        assert httpx.post(url + CHAT, json=body()).status_code == 200


def test_slow_readers_and_idle_connections_hold_nobody_up(slow, loaded):
    engine, settings = slow
    with listening(create_app(engine, loaded()[1], "tiny")) as url:
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        data = json.dumps(body(**settings, stream=True)).encode()
        idle[0].sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(lambda: engine.scheduler.running)
        assert httpx.post(url + CHAT, json=body(max_tokens=3), timeout=5).status_code == 200
        for connection in idle:
            connection.close()
        wait_until(lambda: engine.scheduler.idle, seconds=1.0)


def test_more_than_the_queue_holds_is_refused_at_once(make_engine, loaded):
    engine = make_engine(max_batch=1, max_waiting=1)
    ban = {str(token): bias for token, bias in endless(loaded()[1])["logit_bias"].items()}
    with (
        spoiled(engine.runner, "decode", slowly(engine.runner.decode, 0.02)),
        listening(create_app(engine, loaded()[1], "tiny")) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        statuses = []

        def ask():
            response = client.post(CHAT, json=body(max_tokens=20, logit_bias=ban))
            statuses.append((response.status_code, response.headers.get("retry-after"), time.monotonic()))

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    refused = [status for status in statuses if status[0] == 429]
    assert len(refused) >= 5
    assert {status for status, _, _ in statuses} == {200, 429}
    first_answer = min(at for status, _, at in statuses if status == 200)
    assert all(retry == "1" and at < first_answer for _, retry, at in refused)
