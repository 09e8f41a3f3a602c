"""From a request's bytes to a prompt: messages, images and what they cost, all bounded. Runs off the event loop."""

import binascii
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from serve.engine import ImageInput
from serve.errors import ApiError
from serve.protocol import ChatMessage, Part
from vlm import UserError, VisionLanguageProcessor
from vlm.images import decode_image, decode_size, image_key

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may bring. body_seconds bounds the time that an upload may take."""

    body_bytes: int = 64 * 2**20
    body_seconds: float = 60.0
    images: int = 32
    image_bytes: int = 20 * 2**20
    image_pixels: int = 100_000_000


class AbandonedError(Exception):
    """Nobody waits for the result any more."""


def parse_json(data: bytes) -> Any:
    """ApiError 400 for anything that is not JSON with finite numbers and encodable text."""

    def refuse(name: str) -> Any:
        raise _not_json(f"{name} is not a number of JSON")

    try:
        payload = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
        if rb"\ud" in data or rb"\uD" in data:  # half a surrogate pair is valid in JSON's escapes, but is no text
            json.dumps(payload, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise _not_json("it is not UTF-8") from None
    except UnicodeEncodeError:
        raise _not_json("it has half a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg}, at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise _not_json("it has a number of too many digits") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    return payload


@dataclass(frozen=True)
class ChatPrompt:
    input_ids: Sequence[int]
    images: tuple[ImageInput, ...]


class PromptBuilder:
    """Chat messages -> ids and preprocessed images, the same way as in training. Safe to share between threads."""

    def __init__(self, processor: VisionLanguageProcessor, context_length: int, limits: Limits) -> None:
        self.processor, self.context_length, self.limits = processor, context_length, limits
        # no tokenizer spends fewer tokens on a text than this
        longest_token = max((len(token) for token in processor.tokenizer.get_vocab()), default=1)
        self.max_characters = context_length * longest_token

    def chat(self, messages: Sequence[ChatMessage], abandoned: threading.Event) -> ChatPrompt:
        """ApiError 400 naming the message for images that can't be used; UserError from template and decoder."""
        urls = [
            (f"messages[{m}].content[{p}].image_url", part.image_url.url)
            for m, message in enumerate(messages)
            for p, part in enumerate(message.parts)
            if part.image_url is not None and part.type == "image_url"
        ]
        if len(urls) > self.limits.images:
            text = f"{len(urls)} images in a request, where up to {self.limits.images} are allowed"
            raise ApiError(400, text, param="messages", code="too_many_images")
        self.check_length(sum(len(part.text or "") for message in messages for part in message.parts))
        chat = [{"role": _ROLES.get(m.role, m.role), "content": _content(m)} for m in messages]
        # decoded one by one, after all else is known to be right: a hundred kilobytes may hold a hundred megapixels
        files = [(where, read_data_url(url, where, self.limits.image_bytes)) for where, url in urls]
        sizes = [_decode(decode_size, data, where, self.limits.image_pixels) for where, data in files]
        placeholders = [self.processor.image_tokens.placeholders(*size) for size in sizes]
        encoded = self.processor.chat.encode(chat, placeholders, add_generation_prompt=True)
        if len(encoded.input_ids) >= self.context_length:
            raise self._too_long(f"the prompt has {len(encoded.input_ids)} tokens")
        return ChatPrompt(encoded.input_ids, tuple(self._prepare(where, data, abandoned) for where, data in files))

    def text(self, prompt: str) -> list[int]:
        """Ids of a plain prompt, with what the tokenizer puts before a text."""
        self.check_length(len(prompt))
        tokenizer = self.processor.tokenizer
        begin = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
        return [*begin, *self.processor.chat.encode_text(prompt)]

    def check_length(self, characters: int) -> None:
        """Refuses texts that can't fit before any work is put into them."""
        if characters > self.max_characters:
            raise self._too_long(f"the prompt has {characters} characters")

    def _too_long(self, what: str) -> ApiError:
        text = f"{what}: too long for the context of {self.context_length} tokens"
        return ApiError(400, text, param="messages", code="context_length_exceeded")

    def _prepare(self, where: str, data: bytes, abandoned: threading.Event) -> ImageInput:
        if abandoned.is_set():
            raise AbandonedError
        return prepare_image(_decode(decode_image, data, where, self.limits.image_pixels), self.processor)


def prepare_image(image: Image.Image, processor: VisionLanguageProcessor) -> ImageInput:
    """A decoded image as engines take it."""
    (placeholders,) = processor.placeholders([image])
    return ImageInput(processor.pixels([image]), image_key(image), placeholders)


def _decode(decoder: Callable[[bytes, str, int], T], data: bytes, where: str, max_pixels: int) -> T:
    try:
        return decoder(data, where, max_pixels)
    except UserError as error:
        raise ApiError(400, str(error), param=where, code="invalid_image") from None


def read_data_url(url: str, where: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data URL; ApiError 400 for everything else."""
    if url[:5].lower() != "data:":
        text = f"{where}: remote images are off; send the image as a data: URL"
        raise ApiError(400, text, param=where, code="remote_images_off")
    head, comma, data = url.partition(",")
    if not comma:
        raise ApiError(400, f"{where}: a data URL without a comma", param=where, code="invalid_image")
    if not head.lower().endswith(";base64"):
        raise ApiError(400, f"{where}: a data URL must be base64-encoded", param=where, code="invalid_image")
    if len(data) * 3 // 4 > max_bytes:
        text = f"{where}: the image is over the limit of {max_bytes:,} bytes"
        raise ApiError(400, text, param=where, code="image_too_large")
    try:
        return binascii.a2b_base64(data.encode("ascii"), strict_mode=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are ones
        raise ApiError(400, f"{where}: not valid base64", param=where, code="invalid_image") from None


_ROLES = {"developer": "system"}


def _content(message: ChatMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    if len(message.content) == 1 and message.content[0].type == "text":
        return message.content[0].text or ""
    return [_part(part) for part in message.content]


def _part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part.text or ""} if part.type == "text" else {"type": "image"}


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"the body can't be read as JSON: {why}", code="invalid_json")
