"""Images of requests, decoded as everywhere in the project, and fetched over https from allowed domains only."""

import asyncio
import ipaddress
import socket
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector, MediaIO
from vllm.multimodal.media.base import MediaWithBytes

from serve.errors import ApiError
from serve.media import Limits, read_data_url
from serve.vllm_plugin.names import NO_DOMAIN
from vlm.errors import UserError
from vlm.images import decode_image


class SafeImages(MediaConnector):
    """Takes the place of vLLM's own connector by VLLM_MEDIA_CONNECTOR. Redirects are off by its environment."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        if image_url[:5].lower() == "data:":
            return _from_data_url(image_url)
        self._check(image_url)
        return self.load_from_url(image_url, _Decoder(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        run = partial(asyncio.get_running_loop().run_in_executor, None)
        if image_url[:5].lower() == "data:":
            return await run(_from_data_url, image_url)
        await run(self._check, image_url)
        return await self.load_from_url_async(image_url, _Decoder(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or parts.hostname not in self.allowed_media_domains:
            allowed = ", ".join(domain for domain in self.allowed_media_domains if domain != NO_DOMAIN)
            only = f"https images of {allowed}" if allowed else "images as data: URLs"
            raise VLLMValidationError(f"image_url: this server takes {only} only", parameter="image_url")
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        except OSError:
            raise VLLMValidationError(f"image_url: {parts.hostname} is unknown", parameter="image_url") from None
        if not all(ipaddress.ip_address(address[0]).is_global for *_, address in found):
            raise VLLMValidationError(f"image_url: {parts.hostname} has a private address", parameter="image_url")


class _Decoder(MediaIO[Image.Image]):
    """The project's own decoding, in the form that vLLM's downloads ask for."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        return _decoded(data)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Image.Image]:
        raise NotImplementedError

    def load_file(self, filepath: Any) -> MediaWithBytes[Image.Image]:
        raise NotImplementedError

    def get_max_bytes(self) -> int:
        return Limits.image_bytes


def _from_data_url(url: str) -> MediaWithBytes[Image.Image]:
    try:
        return _decoded(read_data_url(url, "image_url", Limits.image_bytes))
    except ApiError as error:
        raise VLLMValidationError(error.message, parameter=error.param) from None


def _decoded(data: bytes) -> MediaWithBytes[Image.Image]:
    try:
        return MediaWithBytes(decode_image(data, "image_url", Limits.image_pixels), data)
    except UserError as error:
        raise VLLMValidationError(str(error), parameter="image_url") from None
