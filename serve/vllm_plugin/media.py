"""Images of requests, read and decoded as everywhere in the project. In vLLM's place by VLLM_MEDIA_CONNECTOR."""

import asyncio
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.base import MediaWithBytes

from serve.errors import ApiError
from serve.media import Limits, read_data_url
from serve.vllm_plugin.download import check_url, download
from serve.vllm_plugin.names import NO_DOMAIN
from vlm.errors import UserError
from vlm.images import decode_image


class SafeImages(MediaConnector):
    """vLLM's own connector, but for images."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        return asyncio.run(self.fetch_image_async(image_url, image_mode=image_mode))

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        try:
            if image_url[:5].lower() == "data:":
                return await asyncio.to_thread(_from_data_url, image_url)
            check_url(image_url, [domain for domain in self.allowed_media_domains if domain != NO_DOMAIN])
            return await asyncio.to_thread(_decoded, await download(image_url))
        except ApiError as error:
            raise VLLMValidationError(error.message, parameter=error.param) from None
        except UserError as error:
            raise VLLMValidationError(str(error), parameter="image_url") from None


def _from_data_url(url: str) -> Any:
    return _decoded(read_data_url(url, "image_url", Limits.image_bytes))


def _decoded(data: bytes) -> Any:
    return MediaWithBytes(decode_image(data, "image_url", Limits.image_pixels), data)
