"""`vlm data show`: one row as a model sees it, on a terminal."""

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from data.pictures import load_image
from data.records import Record
from data.sources import Source
from vlm.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from data.check_model import ModelSpec, Reader

STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "document": "green"}
CONTROL, IMAGE = "dim", "bold yellow"
COLUMNS = 48  # of a drawn picture
SUPERVISED = "underline"


def show_row(source: Source, number: int, spec: "ModelSpec | None", save: Path | None, draw: bool) -> None:
    """Prints row `number`: with a model its tokens, those that are learned underlined; without, its texts by role.

    save: a folder for the pictures as the model's encoder gets them. UserError with the reason for a broken row.
    """
    from rich.console import Console
    from rich.text import Text

    if not number < len(source):
        raise UserError(f"{source.path}: has rows 0 to {len(source) - 1}, and no row {number}")
    record = source[number]
    try:
        pictures = [load_image(image) for image in record.images]
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    reader = None
    if spec is not None:
        from data.check_model import Reader

        reader = Reader(spec)
    drawn: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor"} if draw else {}
    console = Console(highlight=False, soft_wrap=True, **drawn)
    console.print(Text.assemble((record.where, "bold"), f", {source.format}"))
    for name, picture in zip(record.images, pictures, strict=True):
        console.print(f"{name}: {picture.width} x {picture.height}", style="dim", markup=False)
    console.print(_tokens(record, reader) if reader is not None else _texts(record))
    seen = [view for picture in pictures for view in _views(picture, reader)]
    if draw or sys.stdout.isatty():
        for picture in pictures if reader is None else seen:
            console.print(draw_picture(picture))
    if save is not None:
        for path in _save(seen, save, number):
            console.print(f"written: {path}", markup=False)
    if len(record.captions) > 1:
        console.print(f"one of {len(record.captions)} captions is drawn each time:", style="dim")
        for caption in record.captions:
            console.print(f"  {caption}", style=STYLES["assistant"], markup=False)


def _texts(record: Record) -> "Text":
    from rich.text import Text

    said = Text()
    for message in record.messages:
        style = STYLES[message["role"]]
        said.append(f"{message['role']}: ", "bold " + style)
        for part in message["content"]:
            if part["type"] == "image":
                said.append("<image>", IMAGE)
            else:
                says = message["role"] in ("assistant", "document") and message.get("weight") != 0
                learned = f" {SUPERVISED}" if says else ""
                said.append(printable(part["text"]), style + learned)
        said.append("\n")
    return said


def _tokens(record: Record, reader: "Reader") -> "Text":
    """The tokens of a row. Control tokens are dim, runs of image tokens folded, what is learned underlined."""
    from rich.text import Text

    from data.encode import tokenise

    chat = reader.chat
    placeholders = [reader.placeholders(image) for image in record.images]
    length = reader.measure(record, 0)
    tokens = tokenise(record, chat, placeholders)
    control = {index: token.content for index, token in chat.tokenizer.added_tokens_decoder.items()}
    learned, share = sum(tokens.supervised), sum(tokens.supervised) / max(1, len(tokens.input_ids))
    said = Text(f"{len(tokens.input_ids)} tokens, {learned} of them ({share:.0%}) supervised")
    if length.dropped:
        lost = f"the last {length.dropped} messages don't" if record.kind == "chat" else "its end doesn't"
        said.append(f"; {lost} fit the context of {reader.context}", "yellow")
    said.append("\n")
    triples = zip(tokens.input_ids, tokens.supervised, tokens.messages, strict=True)
    for (kind, on, speaker), run in groupby(triples, lambda triple: (control.get(triple[0]), *triple[1:])):
        ids = [token for token, *_ in run]
        underlined = f" {SUPERVISED}" if on else ""
        if kind == chat.image_token:
            said.append(f"[{kind} x {len(ids)}]", IMAGE)
        elif kind is not None:
            said.append(kind * len(ids), CONTROL + underlined)
        else:
            words = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            style = CONTROL if speaker is None else STYLES[record.messages[speaker]["role"]]
            said.append(printable(words), style + underlined)
    return said


def printable(text: str) -> str:
    """Text without what would move the cursor or colour the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _views(picture: Image.Image, reader: "Reader | None") -> list[Image.Image]:
    """The picture as the encoder gets it: scaled, padded or cut; as it is without a model that says how."""
    if reader is None or reader.processor is None:
        return [picture]
    return unnormalised(reader.processor, [picture])


def unnormalised(processor: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """What a processor makes of pictures, its mean and spread taken back, as 8-bit RGB."""
    import numpy as np

    kind = processor.image_processor
    pixels = processor.pixels(pictures)["pixel_values"].numpy().transpose(0, 2, 3, 1)  # [V, H, W, 3]
    if kind.do_normalize:
        pixels = pixels * np.asarray(kind.image_std) + np.asarray(kind.image_mean)
    if kind.do_rescale:
        pixels = pixels / kind.rescale_factor
    return [Image.fromarray(view) for view in pixels.round().clip(0, 255).astype(np.uint8)]


def draw_picture(picture: Image.Image, columns: int = COLUMNS) -> "Text":
    """A picture in half blocks: each letter is two pixels, one above the other."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    rows = max(2, min(2 * columns, round(columns * picture.height / picture.width)) // 2 * 2)
    small = picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    drawn = Text()
    for top in range(0, rows, 2):
        for column in range(columns):
            above, below = (Color.from_rgb(*_pixel(small, column, top + more)) for more in (0, 1))
            drawn.append("▀", Style(color=above, bgcolor=below))
        drawn.append("\n")
    return drawn


def _pixel(picture: Image.Image, column: int, row: int) -> tuple[int, int, int]:
    pixel = picture.getpixel((column, row))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


def _save(views: Sequence[Image.Image], folder: Path, number: int) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"row{number}-{place}.png" for place in range(len(views))]
        for path, view in zip(paths, views, strict=True):
            view.save(path)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    return paths
