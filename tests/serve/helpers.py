"""Pictures, prompts, requests and what comes back, for the tests of serving."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from serve.engine import ImageInput, SamplingParams
from serve.engine import Request as EngineRequest
from serve.media import prepare_image
from serve.torch_engine import TorchEngine
from vlm import VisionLanguageModel, VisionLanguageProcessor

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Loaded = tuple[VisionLanguageModel, VisionLanguageProcessor]


def picture(seed: int, width: int = 40, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_ids(processor: VisionLanguageProcessor, text: str, images: int = 0) -> list[int]:
    content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    placeholders = processor.placeholders([picture(0)] * images)
    message = {"role": "user", "content": content}
    return processor.chat.encode([message], placeholders, add_generation_prompt=True).input_ids


def image_input(processor: VisionLanguageProcessor, image: Image.Image) -> ImageInput:
    return prepare_image(image, processor)


def make_request(
    processor: VisionLanguageProcessor, text: str, images: tuple[Image.Image, ...] = (), n: int = 1, **sampling: Any
) -> EngineRequest:
    """A chat of one question; greedy unless told otherwise."""
    settings = {"temperature": 0.0, "max_tokens": 16, **sampling}
    return EngineRequest(
        id=f"{random.random()}",
        input_ids=chat_ids(processor, text, len(images)),
        images=tuple(image_input(processor, image) for image in images),
        sampling=SamplingParams(**settings),
        n=n,
    )


def endless(processor: VisionLanguageProcessor) -> dict[str, Any]:
    """Sampling settings under which an answer never ends by itself."""
    return {"logit_bias": {processor.tokenizer.eos_token_id: -100.0}, "max_tokens": 450}


@contextmanager
def spoiled(target: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """An attribute of one object replaced for a while, from whatever thread it is used."""
    original = getattr(target, name)
    setattr(target, name, replacement)
    try:
        yield
    finally:
        setattr(target, name, original)


def slowly(function: Callable[..., Any], seconds: float = 0.01) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return slow


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def chat_body(text: str = "what is it?", images: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """A request of the chat route."""
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8} | settings


def events(response: Any) -> list[dict[str, Any]]:
    """The objects of a streamed response, after checking its form."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    """The error of a response, after checking its shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    assert "/work" not in response.text
    assert " at 0x" not in response.text
    return error


async def collect(engine: TorchEngine, request: EngineRequest, delay: float = 0.0) -> list[tuple[list[int], str, str]]:
    """Per choice: token ids, text and finish reason."""
    await asyncio.sleep(delay)
    choices: dict[int, tuple[list[int], list[str], list[Any]]] = {i: ([], [], []) for i in range(request.n)}
    async for delta in engine.submit(request):
        ids, text, finish = choices[delta.choice]
        ids.extend(delta.token_ids)
        text.append(delta.text)
        finish.append(delta.finish_reason)
    return [(ids, "".join(text), finish[-1]) for ids, text, finish in choices.values()]


def run(engine: TorchEngine, *requests: EngineRequest, stagger: float = 0.0) -> Any:
    """What `collect` gives for each request, all sent together or one after another."""

    async def all_of_them() -> Any:
        return await asyncio.gather(*(collect(engine, r, i * stagger) for i, r in enumerate(requests)))

    return asyncio.run(all_of_them())
