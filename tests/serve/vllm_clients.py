"""Clients of a real vLLM that leave before their answer is whole, and clients whose image is broken."""

import base64
import contextlib
import json
import random
import socket
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

from tests.serve.helpers import CHAT, data_url, picture, refused, wait_until
from tests.serve.vllm_models import Case, Oracle, assert_same_tokens, cases
from tests.serve.vllm_server import KEY, Server, chat

TOKENS = 400  # of an answer that nobody waits for: a second of work and more
AT_ONCE = 12
MOMENTS = ("half a request", "nothing was said", "the headers came", "some tokens came")


def assert_idle(server: Server) -> None:
    """Nothing runs, nothing waits, and no memory is held. Figures are those of the last step, so there must be one."""
    with server.client() as client:
        assert client.post(CHAT, json=chat(Case("hi", ()), max_tokens=1)).status_code == 200

    def idle() -> bool:
        now = server.metrics()
        return not any(now[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    wait_until(idle, 10)


def assert_leaving_is_harmless(server: Server, oracle: Oracle, count: int) -> None:
    """So many clients leave at random moments while others wait for their answers, which are right, then and after.

    Fails where the server goes on working for those who left.
    """
    before = server.metrics()
    numbers = random.Random(1)
    given = cases(count + 3)
    asked = cases(max(9, count // 10))
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:
        staying = pool.submit(server.ask, asked)
        moments = [MOMENTS[i % len(MOMENTS)] for i in range(count)]
        leaving = [
            pool.submit(leave, server, case, moment, numbers.randint(1, 40))
            for case, moment in zip(given, moments, strict=False)
        ]
        seen = [done.result() for done in leaving]
        got = staying.result()
    assert_same_tokens(oracle, asked, got)
    assert_idle(server)
    assert_same_tokens(oracle, asked, server.ask(asked))
    grown = {name: value - before.get(name, 0.0) for name, value in server.metrics().items()}
    stayed = 2 * sum(len(oracle.answer(case).output) for case in asked) + 1
    unread = grown["generation_tokens_total"] - stayed - sum(seen)
    whole = sum(moment != MOMENTS[0] for moment in moments)
    # one in eight on an idle machine, more where the server hears late that somebody left, all where it doesn't care
    assert unread < 0.9 * whole * TOKENS, f"{unread} tokens were made for nobody"
    assert sum(seen) > 2 * count / len(MOMENTS), "nobody left in the middle of an answer"


def leave(server: Server, case: Case, moment: str, tokens: int) -> int:
    """Asks for a long answer and leaves. Returns how many tokens were seen."""
    body = chat(case, max_tokens=TOKENS, ignore_eos=True, stream=True)
    if moment in MOMENTS[:2]:
        _hang_up(server.url, json.dumps(body).encode(), half=moment == MOMENTS[0])
        return 0
    seen = 0
    with server.client() as client, client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        if moment == "some tokens came":
            for line in response.iter_lines():
                choices = json.loads(line[6:])["choices"] if line.startswith("data: {") else []
                seen += sum("content" in choice["delta"] and choice["delta"].get("role") is None for choice in choices)
                if seen >= tokens:
                    break
    return seen


def _hang_up(url: str, body: bytes, half: bool) -> None:
    address = urlsplit(url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as connection:
        # reset, as by a client that was killed
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(sent[: len(sent) // 2] if half else sent)
        if not half:
            connection.settimeout(0.15)  # so that the server has read it, and is at any point of its work
            with contextlib.suppress(TimeoutError):
                connection.recv(1)


def broken_urls() -> dict[str, str]:
    """What is sent in place of an image, by what is wrong with it."""
    png, jpeg = (_file(picture(1, 100, 100), kind) for kind in ("PNG", "JPEG"))
    bomb = _file(Image.new("1", (20_000, 20_000)), "PNG")
    claims = b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + b"\0\0\0," + bytes(29)
    header = bytearray(png)
    header[20] ^= 0xFF  # its height; the checksum is wrong then, too
    nothing = bytearray(png)
    nothing[16:24] = bytes(8)
    broken = {
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "only a head": png[:24],
        "html": b"<html><body>not found</body></html>",
        "400 Mpx": bomb,
        "4 Gpx in 44 bytes": claims,
        "another height": bytes(header),
        "no size": bytes(nothing),
        "noise": random.Random(0).randbytes(3000),
        "zeros": bytes(3000),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    }
    good = base64.b64encode(png).decode()
    return {
        **{name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in broken.items()},
        "empty": "data:image/png;base64,",
        "no comma": "data:image/png;base64",
        "no base64": "data:image/png," + good,
        "not the alphabet": "data:image/png;base64,@@@@",
        "a character missing": "data:image/png;base64," + good.rstrip("=")[:-1],
        "another alphabet": "data:image/png;base64,ü" + good,
        "21 MB": "data:image/png;base64," + "A" * 28 * 2**20,
        "a path": "/etc/passwd",
        "a file": "file:///etc/passwd",
        "an address": "http://169.254.169.254/latest/meta-data",
        "nothing": "",
    }


def _file(image: Image.Image, kind: str) -> bytes:
    return base64.b64decode(data_url(image, kind).partition(",")[2])


def assert_broken_images_are_harmless(server: Server, oracle: Oracle, count: int) -> None:
    """So many requests with a broken image, alone or beside a good one, get a 4xx in our shape, others right ones."""
    urls = list(broken_urls().items())
    asked = cases(max(9, count // 4))
    with ThreadPoolExecutor(5) as pool, server.client() as client:
        staying = pool.submit(server.ask, asked)
        sent: list[tuple[str, Future[httpx.Response]]] = []
        post: Callable[..., httpx.Response] = client.post
        for index in range(count):
            name, url = urls[index % len(urls)]
            sent.append((name, pool.submit(post, CHAT, json=_broken(index, url))))
        for name, response in sent:
            _assert_refused(name, response.result())
        got = staying.result()
    assert_same_tokens(oracle, asked, got)
    assert_idle(server)
    assert_same_tokens(oracle, asked, server.ask(asked))


def _broken(index: int, url: str) -> dict[str, Any]:
    """The broken image stands alone, after a good one, or before it."""
    body = chat(Case(f"{index} what is it?", tuple([picture(index)] * (index % 3 > 0))), max_tokens=24)
    body["messages"][0]["content"].insert(int(index % 3 == 1), {"type": "image_url", "image_url": {"url": url}})
    return body | {"stream": index % 2 == 0}


def _assert_refused(name: str, response: httpx.Response) -> None:
    assert response.status_code in (400, 413), f"{name}: {response.status_code} {response.text[:300]}"
    error = refused(response, response.status_code)
    assert error["type"] == "invalid_request_error", name
    assert len(response.content) < 1000, name
