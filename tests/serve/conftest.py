"""Models behind engines for the tests of serving."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from serve.app import create_app
from serve.media import Limits
from serve.torch_engine import TorchEngine
from tests.serve.helpers import Loaded
from vlm import load


@pytest.fixture(scope="session")
def loaded(tiny_models: Any) -> Callable[..., Loaded]:
    """(fusion, connector) -> the tiny model and its processor, loaded once."""
    known: dict[tuple[str, str], Loaded] = {}

    def get(fusion: str = "early", connector: str = "mlp") -> Loaded:
        if (fusion, connector) not in known:
            known[fusion, connector] = load(tiny_models(fusion, connector))
        return known[fusion, connector]

    return get


@pytest.fixture
def make_engine(loaded: Callable[..., Loaded]) -> Iterator[Callable[..., TorchEngine]]:
    """(fusion, connector, **settings) -> a started engine, stopped after the test."""
    engines: list[TorchEngine] = []

    def make(fusion: str = "early", connector: str = "mlp", **settings: Any) -> TorchEngine:
        engine = TorchEngine(*loaded(fusion, connector), name="tiny", **settings)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and lose much where another process uses the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def client(make_engine: Callable[..., TorchEngine], loaded: Callable[..., Loaded]) -> TestClient:
    """A client of a small server; `client.engine` and `client.app` give access to what is behind it."""
    engine = make_engine(max_batch=4, max_waiting=2)
    app = create_app(engine, loaded()[1], "tiny", limits=Limits(body_bytes=300_000, images=4, image_bytes=60_000))
    client = TestClient(app, raise_server_exceptions=False)
    client.engine = engine  # type: ignore[attr-defined]
    return client
