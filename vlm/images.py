"""Decoding of untrusted images: allow-listed formats, bounded size, orientation applied, always RGB."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlm.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file, as RGB. UserError when there is none, or none that may be decoded."""
    return decode_image(_read(path), str(path), max_pixels)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the image that `read_image` gives, from the file's header."""
    return decode_size(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not an image") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def decode_image(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Bytes of an image -> RGB, the first frame, EXIF orientation applied; transparency is laid over white.

    The size is checked on the header, before any pixel is decoded. Raises UserError beginning with `name`.
    """
    with _explained(name):
        image = _open(data, name, max_pixels)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def decode_size(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the image that `decode_image` gives, from its header."""
    with _explained(name):
        image = _open(data, name, max_pixels)
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        turned &= image.format != "TIFF"  # of which Pillow gives the size as it will be
        return (image.width, image.height) if turned else (image.height, image.width)


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise UserError(f"{name}: empty, not an image")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{name}: an image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise UserError(f"{name}: {width} x {height} pixels are over the limit of {max_pixels:,}")
    return image


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of big images and odd metadata; both are handled here
            yield
    except Image.DecompressionBombError:
        raise UserError(f"{name}: too many pixels to be decoded") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image of a known format ({', '.join(FORMATS)})") from None
    except UserError:
        raise
    except Exception as error:  # decoders fail in their own ways on broken files
        raise UserError(f"{name}: a broken image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB: 16-bit and float greys are scaled to 8 bits, transparency is laid over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        peak = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
        return Image.fromarray((values.clip(0, peak) / peak * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def image_key(image: Image.Image) -> str:
    """A content key: the same pixels of the same size and mode, and nothing else, have it."""
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
