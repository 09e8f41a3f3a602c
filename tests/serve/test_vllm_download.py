import asyncio
import gzip
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serve.vllm_plugin import download as module
from serve.vllm_plugin.download import check_url, download
from vlm.errors import UserError

DOMAINS = ["images.example", "other.example"]


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example/a.png",
        "ftp://images.example/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "https://evil.example/a.png",
        "https://images.example.evil.example/",
        "https://images.example@evil.example/",
        "https://me:secret@images.example/",
        "https://evil.example\\@images.example/",
        "https://evil.example/\\@images.example",
        "https://169.254.169.254/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://2130706433/",
        "https://[images.example/",
        "https://images.example:x/",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    for domains in (DOMAINS, [], ["169.254.169.254", "::1"]):
        with pytest.raises(UserError, match="image_url: "):
            check_url(url, domains)


def test_allowed_urls_pass() -> None:
    for url in ("https://images.example/a.png", "https://Other.Example:8443/b?c=d#e"):
        check_url(url, DOMAINS)
    with pytest.raises(UserError, match="as data: URLs only"):
        check_url("https://images.example/a.png", [])


PRIVATE = (
    "127.0.0.1 10.1.2.3 169.254.169.254 ::1 fe80::1%eth0 0.0.0.0 224.0.0.1 ff02::1 fec0::1 ::ffff:127.0.0.1 ::7f00:1 "
    "64:ff9b::7f00:1 2002:7f00:1:: 2001:0:7f00:1::"
).split()


@pytest.mark.parametrize("address", PRIVATE)
def test_names_of_private_addresses_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any, **__: Any) -> list[Any]:
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        known = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))]
        return [*known, (kind, socket.SOCK_STREAM, 6, "", (address, 443))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with pytest.raises(UserError, match="not public"):
        asyncio.run(download("https://images.example/a.png"))


class Site(http.server.BaseHTTPRequestHandler):
    """What images of the web may do to who fetches them."""

    seen: list[str] = []

    def do_GET(self) -> None:
        assert self.headers["Host"].startswith("images.example:")
        self.seen.append(self.path)
        kind = self.path.strip("/")
        self.send_response(302 if kind == "redirect" else 404 if kind == "missing" else 200)
        if kind == "redirect":
            self.send_header("Location", "/good")
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        if kind == "lying":
            self.send_header("Content-Length", "1000000000000")
        self.end_headers()
        with_data = {"good": b"picture", "packed": gzip.compress(b"0" * 100_000), "lying": b"short"}
        try:
            self.wfile.write(with_data.get(kind, b""))
            while kind in ("endless", "drip"):
                self.wfile.write(b"0" * (1_000_000 if kind == "endless" else 1))
                self.wfile.flush()
                time.sleep(0.0 if kind == "endless" else 0.05)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://images.example:{server.server_port}"
        server.shutdown()


def fetch(url: str) -> bytes:
    async def here(host: str, port: int) -> list[str]:
        assert host == "images.example"
        return ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first

    return asyncio.run(download(url, here, seconds=0.5))


def test_a_download_is_bounded_and_follows_nobody(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Limits, "image_bytes", 200_000)
    assert fetch(f"{site}/good") == b"picture"
    assert len(fetch(f"{site}/packed")) < 1000, "a packed answer is unpacked, however large it grows"
    for kind, said in (
        ("redirect", "status 302"),
        ("missing", "status 404"),
        ("endless", "over the limit"),
        ("drip", "did not arrive"),
        ("lying", "broke off"),
    ):
        Site.seen.clear()
        with pytest.raises(UserError, match=said):
            fetch(f"{site}/{kind}")
        assert Site.seen == [f"/{kind}"]
    with pytest.raises(UserError, match="can't be reached"):
        fetch("http://images.example:9/")
