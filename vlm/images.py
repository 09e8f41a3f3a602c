"""Decoding of untrusted images: allow-listed formats, bounded size, orientation applied, always RGB."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlm.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file, as RGB. UserError when there is none, or none that may be decoded."""
    return decode_image(read_file(path), str(path), max_pixels)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the image that `read_image` gives, from the file's header; no more of it is read."""
    with _opened(path) as file:
        return decode_size(file, str(path))


def read_file(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
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
        image = _open(io.BytesIO(data), name, max_pixels)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def decode_size(data: bytes | BinaryIO, name: str = "image", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the image that `decode_image` gives, from its header: of a file, little is read."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with _explained(name):
        image = _open(file, name, max_pixels)
        # Pillow decodes a PNG for what may stand behind its pixels, which is seldom there
        early = image.format == "PNG" and not _tells_late(file)
        exif = Image.Image.getexif(image) if early else image.getexif()
        turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        turned &= image.format != "TIFF"  # of which Pillow gives the size as it will be
        return (image.width, image.height) if turned else (image.height, image.width)


def image_format(data: bytes, name: str = "image") -> str:
    """The name of an image's format, from its header. UserError as in `decode_image`."""
    with _explained(name):
        return str(_open(io.BytesIO(data), name, MAX_PIXELS).format)


def _tells_late(file: BinaryIO) -> bool:
    """Whether a PNG may name its orientation behind its pixels; so may one of too many chunks to look at."""
    place, pixels = 8, False
    for _ in range(10_000):
        file.seek(place)
        head = file.read(8)
        kind = head[4:]
        if len(head) < 8 or kind == b"IEND":
            return False
        pixels |= kind == b"IDAT"
        if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        place += 12 + int.from_bytes(head[:4], "big")
    return True


def _open(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    if not file.read(1):
        raise UserError(f"{name}: empty, not an image")
    file.seek(0)
    image = Image.open(file, formats=FORMATS)
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
