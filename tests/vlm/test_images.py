"""Decoding of pictures that people and attackers send."""

import io
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm import UserError
from vlm.images import MAX_PIXELS, decode_image, decode_size, image_key, read_image, read_size

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, **options: Any) -> np.ndarray[Any, Any]:
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(values[..., None], 3, axis=2)


def over_white(colours: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    share = alpha.astype(float) / 255
    return colours * share + 255 * (1 - share)


def test_colours_come_through_unchanged() -> None:
    for kind in ("PNG", "BMP", "TIFF", "WEBP"):
        data = encoded(Image.fromarray(COLOURS), kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert (decoded(data) == COLOURS).all(), kind


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
@pytest.mark.parametrize("progressive", [False, True])
def test_lossy_formats_come_close(kind: str, progressive: bool) -> None:
    smooth = Image.fromarray(COLOURS).resize((70, 50), Image.Resampling.BICUBIC)
    data = encoded(smooth, kind, quality=95, **({"progressive": progressive} if kind == "JPEG" else {}))
    assert np.abs(decoded(data).astype(int) - np.asarray(smooth)).mean() < 6


def test_greys_and_black_and_white_become_rgb() -> None:
    assert (decoded(encoded(Image.fromarray(GREY))) == grey(GREY)).all()
    bits = Image.fromarray(GREY).point(lambda value: 255 * (value > 127)).convert("1")
    assert (decoded(encoded(bits)) == grey(255 * (GREY > 127))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    assert (decoded(encoded(image, kind)) == grey((values / 257).round().astype(np.uint8))).all()


def test_wide_integers_and_floats_are_scaled_and_cut_off() -> None:
    wide = Image.fromarray(np.array([[-5, 0, 65535, 1 << 30]], dtype=np.int32))
    assert decoded(encoded(wide, "TIFF"))[0, :, 0].tolist() == [0, 0, 255, 255]
    for top in (1.0, 200.0):
        floats = Image.fromarray(np.array([[-1.0, 0.0, top / 2, top]], dtype=np.float32))
        assert decoded(encoded(floats, "TIFF"))[0, :, 1].tolist() == [0, 0, 128, 255]
    odd = np.array([[np.nan, np.inf, -np.inf, 1.0]], dtype=np.float32)
    assert decoded(encoded(Image.fromarray(odd), "TIFF")).shape == (1, 4, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparency_is_laid_over_white(mode: str, kind: str) -> None:
    colours = COLOURS if mode == "RGBA" else grey(GREY)
    layer = Image.fromarray(np.concatenate([colours, ALPHA], axis=2)).convert(mode)
    base = np.asarray(layer.convert("RGBA"))[..., :3]
    assert np.abs(decoded(encoded(layer, kind)) - over_white(base, ALPHA)).max() <= 1


def test_a_transparent_colour_becomes_white() -> None:
    for mode, colour in (("RGB", (1, 2, 3)), ("L", 7)):
        image = Image.new(mode, (3, 1), colour)
        image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 9)
        seen = decoded(encoded(image, transparency=colour))
        assert seen[0].tolist() == [[255] * 3, [9] * 3, [255] * 3], mode
    palette = Image.new("P", (3, 1), 4)
    palette.putpalette([value for n in range(6) for value in (n, 10 * n, 40 * n)])
    palette.putpixel((1, 0), 5)
    for kind in ("PNG", "GIF"):
        seen = decoded(encoded(palette, kind, transparency=4))
        assert seen[0].tolist() == [[255] * 3, [5, 50, 200], [255] * 3], kind
    assert decoded(encoded(palette))[0].tolist() == [[4, 40, 160], [5, 50, 200], [4, 40, 160]]


def test_cmyk_becomes_rgb() -> None:
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        red, green, blue = decoded(encoded(inks, kind))[8, 8].astype(int)
        assert red > 220 > 40 > max(green, blue), kind


TURNED = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, -1),
    7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOURS),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decoded(encoded(Image.fromarray(COLOURS), exif=exif)) == TURNED[orientation]).all()
    large = Image.fromarray(COLOURS).resize((70, 50), Image.Resampling.NEAREST)
    seen = decode_image(encoded(large, "JPEG", exif=exif, quality=95))
    assert seen.size == ((70, 50) if orientation < 5 else (50, 70))


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "GIF"])
def test_the_size_is_known_from_the_header_alone(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {} if kind in ("BMP", "GIF") else {"exif": exif}
    data = encoded(Image.new("RGB", (70, 50), (9, 99, 199)), kind, **settings)
    image = decode_image(data)
    assert decode_size(data) == (image.height, image.width)
    (tmp_path / "picture").write_bytes(data)
    assert read_size(tmp_path / "picture") == (image.height, image.width)
    assert image.size == ((50, 70) if orientation > 4 and settings else (70, 50))


def test_an_orientation_behind_the_pixels_is_found() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (70, 50)), exif=exif)
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4]) + 12
    end = data.index(b"IEND") - 4
    moved = data[:start] + data[start + length : end] + data[start : start + length] + data[end:]
    assert decode_image(moved).size == (50, 70)
    assert decode_size(moved) == (70, 50)


class Counting(io.BytesIO):
    """A file that knows how much of it was read."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.taken += len(found)
        return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_of_a_large_file_only_the_header_is_read_for_the_size(kind: str) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (400, 300, 3), dtype=np.uint8)), kind)
    file = Counting(data)
    assert decode_size(file) == (400, 300)
    assert file.taken < 10_000 < len(data) / 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, loop=0)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    seen = decoded(data)
    assert seen.shape == (6, 8, 3)
    assert np.abs(seen.astype(int) - [250, 0, 0]).max() < 12


@pytest.mark.parametrize("size", [(1, 1), (60000, 1), (1, 60000)])
def test_extreme_shapes_are_decoded(size: tuple[int, int]) -> None:
    assert decode_image(encoded(Image.new("RGB", size, (1, 2, 3)))).size == size


def test_what_follows_or_hides_in_a_picture_does_no_harm() -> None:
    data = encoded(Image.fromarray(COLOURS))
    assert (decoded(data + b"PK\x03\x04 and more" * 99) == COLOURS).all()


BAD = {
    "empty": (b"", "empty, not an image"),
    "text": (b"not a picture at all, but words", "not an image of a known format"),
    "html": (b"<!doctype html><html><body>404</body></html>", "not an image of a known format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image of a known"),
    "a format that isn't allowed": (encoded(Image.fromarray(COLOURS), "PPM"), "not an image of a known format"),
    "zeros": (bytes(10_000), "not an image of a known format"),
    "half a PNG": (encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))[:6000], "broken image"),
    "half a JPEG": (encoded(Image.new("RGB", (64, 64)), "JPEG")[:400], "broken image|known format"),
    "a PNG's first bytes": (encoded(Image.fromarray(COLOURS))[:20], "broken image|known format"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_picture_is_refused_by_name(bad: str) -> None:
    data, complaint = BAD[bad]
    with pytest.raises(UserError, match=f"^the upload: .*({complaint})"):
        decode_image(data, "the upload")


def png_of(width: int, height: int) -> bytes:
    """A real black and white PNG: 400 million pixels fit into 50 KB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(6)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif_of(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    return head + b"\x2c" + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x44\x01\x00;"


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def bombs() -> dict[str, bytes]:
    """Small files that claim to be huge."""
    small = Image.new("RGB", (123, 119))
    tiff = encoded(small, "TIFF")
    webp = encoded(small, "WEBP", lossless=True)
    bits = int.from_bytes(webp[21:25], "little") & ~0xFFFFFFF
    return {
        "png": png_of(20000, 20000),
        "gif": gif_of(65535, 65535),
        "gif with a huge frame": gif_of(1, 65535),
        "jpeg": patched(encoded(small, "JPEG"), struct.pack(">HH", 119, 123), struct.pack(">HH", 65500, 65500)),
        "bmp": patched(encoded(small, "BMP"), struct.pack("<ii", 123, 119), struct.pack("<ii", 65500, 65500)),
        "tiff": patched(
            patched(tiff, struct.pack("<HHII", 256, 4, 1, 123), struct.pack("<HHII", 256, 4, 1, 1 << 20)),
            struct.pack("<HHII", 257, 4, 1, 119),
            struct.pack("<HHII", 257, 4, 1, 1 << 20),
        ),
        "webp": webp[:21] + (bits | 16383 | 16383 << 14).to_bytes(4, "little") + webp[25:],
    }


BOMB_RUN = """
import pathlib, resource, sys
from vlm.images import decode_image, decode_size, read_size
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
room = int(status["VmSize"].split()[0]) * 1024 + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        decode_image(path.read_bytes(), path.name)
    except ValueError as error:
        print(error)
"""


def test_files_that_claim_to_be_huge_are_refused_in_no_time() -> None:
    for name, data in bombs().items():
        start = time.perf_counter()
        with pytest.raises(UserError, match=f"{name}: .*(over the limit of 100,000,000|too many pixels)"):
            decode_image(data, name)
        assert time.perf_counter() - start < 0.5, name
        assert len(data) < 100_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is bounded and measured on Linux only")
def test_files_that_claim_to_be_huge_are_refused_in_little_memory(tmp_path: Path) -> None:
    files = {name: data for name, data in bombs().items() if name != "webp"}  # libwebp reserves what it never touches
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMB_RUN, str(tmp_path), str(48 << 20)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(":")[0] for line in told] == sorted(files)
    assert all("over the limit" in line or "too many pixels" in line for line in told)


def test_the_limit_is_exact_and_ones_own() -> None:
    data = encoded(Image.new("RGB", (20, 30)))
    assert decode_image(data, max_pixels=600).size == (20, 30)
    with pytest.raises(UserError, match="20 x 30 pixels are over the limit of 599"):
        decode_image(data, max_pixels=599)
    assert MAX_PIXELS <= 100_000_000


def test_a_file_is_read_and_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(encoded(Image.fromarray(COLOURS)))  # the name says nothing about the format
    assert (np.asarray(read_image(tmp_path / "a.txt")) == COLOURS).all()
    for path, complaint in ((tmp_path / "none.png", "no such image"), (tmp_path, "a folder, not an image")):
        with pytest.raises(UserError, match=complaint) as error:
            read_image(path)
        assert str(error.value).startswith(str(path))


def test_a_key_tells_pictures_of_the_same_bytes_apart() -> None:
    pixels = RNG.integers(0, 256, 48, dtype=np.uint8)
    shapes = [Image.fromarray(pixels.reshape(shape)) for shape in ((2, 8, 3), (8, 2, 3), (4, 4, 3))]
    shapes += [Image.fromarray(pixels.reshape(shape)) for shape in ((6, 8), (3, 4, 4))]
    shapes.append(Image.frombytes("CMYK", (4, 3), pixels.tobytes()))
    near = pixels.copy()
    near[-1] ^= 1
    shapes.append(Image.fromarray(near.reshape(2, 8, 3)))
    assert len({image.tobytes() for image in shapes}) == 2
    keys = [image_key(image) for image in shapes]
    assert len(set(keys)) == len(keys)
    assert keys == [image_key(image.copy()) for image in shapes]
    reread = decode_image(encoded(shapes[0]))
    assert image_key(reread) == keys[0]  # the pixels count, not the file
