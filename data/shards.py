"""WebDataset: tars of samples, a sample being the files of one name up to its first dot, one behind the other."""

import math
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.formats import row_format
from data.index import Arrays, indexed
from data.key_map import KeyMap
from data.pictures import ImageSlice
from data.progress import Tell, progress
from data.records import IMAGE_SUFFIXES, Record
from data.row_keys import is_picture_key, plain_key
from data.rows import Source, parse
from data.scanner import MOST_BYTES
from vlm.errors import UserError, first_line

_BLOCK = 512
_KEEP_FROM = 1 << 20  # bytes of a shard; there may be thousands, opened anew by each worker
_TEXTS = ("json", "txt", "caption")
_NAMES = ("image", "images", "imagename")  # keys that name a picture of the sample, or are wrong


class Shards(Source):
    """Samples of local tars: pictures (.jpg, .0.jpg ...) with a .txt or .caption, or a .json that is a row.

    A row names its pictures by member or suffix; where it names none it has the sample's pictures in order. Nothing is
    unpacked: a picture is a stretch of its tar.
    """

    holds_images = True

    def __init__(
        self,
        path: Path,
        shards: Sequence[Path],
        images: Path | None = None,
        row_format: str | None = None,
        keep: bool = True,
        columns: KeyMap = (),
    ) -> None:
        """keep: the index of a big tar, for the next run."""
        super().__init__(path, images or shards[0].parent, row_format, columns)
        self.shards, self.format = list(shards), "webdataset"
        starts: list[np.ndarray[Any, Any]] = []
        with progress(f"indexing {len(shards)} shards", len(shards)) as tell:
            for number, shard in enumerate(shards):
                starts.append(_index(shard, keep))
                tell(number + 1)
        self._starts = starts  # [samples + 1] of each shard
        self._firsts = np.concatenate(([0], np.cumsum([len(found) - 1 for found in starts])))
        if not len(self):
            raise UserError(f"{path}: no samples in it")

    def __reduce__(self) -> tuple[type[Source], tuple[Any, ...]]:
        return type(self), (self.path, self.shards, self.images, self.row_format, True, self.columns)

    def files(self) -> list[Path]:
        return self.shards

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def where(self, index: int) -> str:
        shard, start, _ = self._place(index)
        with _open(shard) as file:
            file.seek(start)
            with _opened(file, shard) as tar:
                member = tar.next()
        return f"{shard}[{_key(member.name) if member else index}]"

    def row(self, index: int) -> Any:
        """The sample's .json, or its text as a row of captions."""
        where, texts, _, others = self._sample(index)
        return _row(texts, others, where)

    def read(self, index: int, lenient: bool = False) -> Record:
        where, texts, pictures, others = self._sample(index)
        return self.record(_named(_row(texts, others, where), pictures, where), where, lenient)

    def _sample(self, index: int) -> tuple[str, dict[str, bytes], dict[str, ImageSlice], dict[str, str]]:
        """Where it is, its texts and its pictures by suffix, and the names of its other files."""
        shard, start, end = self._place(index)
        pictures: dict[str, ImageSlice] = {}
        texts: dict[str, bytes] = {}
        others: dict[str, str] = {}
        where = f"{shard}[{index}]"
        with _open(shard) as file:
            file.seek(start)
            with _opened(file, shard) as tar:
                for member in _members(tar, end, where):
                    where = f"{shard}[{_key(member.name)}]"
                    suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
                    if not member.isreg() or member.sparse is not None:
                        raise UserError(f"{where}: {member.name} is no plain file but a link or the like")
                    if suffix in pictures or suffix in texts:
                        raise UserError(f"{where}: two of its files end in .{suffix}")
                    if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
                        pictures[suffix] = ImageSlice(shard, member.offset_data, member.size, member.name)
                    elif suffix in _TEXTS:
                        if member.size > MOST_BYTES:
                            raise UserError(f"{where}: a .{suffix} of {member.size >> 20} MB")
                        file.seek(member.offset_data)
                        texts[suffix] = file.read(member.size)
                    else:
                        others[f".{suffix}"] = member.name
        return where, texts, pictures, others

    def _place(self, index: int) -> tuple[Path, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._firsts, index, "right")) - 1
        starts, inside = self._starts[number], index - int(self._firsts[number])
        return self.shards[number], int(starts[inside]), int(starts[inside + 1])


def _members(tar: tarfile.TarFile, end: int, where: str) -> Iterator[tarfile.TarInfo]:
    """Its members up to a place in the file, without folders."""
    try:
        member = tar.next()
        while member is not None:
            if not member.isdir():
                yield member
            member = tar.next() if tar.offset < end else None
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{where}: cannot be read ({first_line(error)})") from None


def _row(texts: dict[str, bytes], others: dict[str, str], where: str) -> Any:
    """The sample's row, with what its other files say or are called by their suffixes: as if these were keys of it."""
    row = parse(texts["json"], where.__str__) if "json" in texts else None
    words = {suffix: _decoded(texts[suffix], suffix, where) for suffix in ("txt", "caption") if suffix in texts}
    if isinstance(row, dict) and row_format(row) is not None:
        return {**row, **{f".{suffix}": text for suffix, text in words.items() if text not in row.values()}, **others}
    if words:
        suffix, caption = next(iter(words.items()))
        beside = {f".{other}": text for other, text in words.items() if other != suffix and text != caption}
        metadata = {f".json {key}": True for key in row} if isinstance(row, dict) else {}
        return {"image": None, "caption": caption, **metadata, **beside, **others}
    if "json" in texts:
        return row  # of which `read_row` says what is wrong
    raise UserError(f"{where}: a sample needs a .txt, .caption or .json")


def _decoded(text: bytes, suffix: str, where: str) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of its .{suffix} is no UTF-8") from None


def _named(row: Any, pictures: dict[str, ImageSlice], where: str) -> Any:
    """The row with the sample's pictures in the place of their names; where it names none, it has them in order.

    Pictures that a row doesn't name beside others that it names are left out, as keys that nothing is read from are.
    """
    named: set[str] = set()

    def find(value: Any, key: str = "", picture: bool = False) -> Any:
        if isinstance(value, dict):
            inside = picture or is_picture_key(key)
            return {
                inner: find(held, inner, is_picture_key(inner) or (inside and inner in ("url", "path")))
                for inner, held in value.items()
            }
        if isinstance(value, list):
            return [find(held, key, picture) for held in value]
        if not isinstance(value, str) or not picture or value.startswith("data:"):
            return value
        for suffix, found in pictures.items():
            if value in (suffix, found.name, found.name.rpartition("/")[2]):
                named.add(suffix)
                return found
        if plain_key(key) in _NAMES:
            raise UserError(
                f"{where}: image {value[:80]!r} is not in its sample ({', '.join(pictures) or 'no pictures'})"
            )
        return value  # such as the path that the picture once had

    if not isinstance(row, dict):
        return row
    row = find(row)
    if not named and pictures:
        return {**row, "image": None, "images": list(pictures.values())}
    return {**row, **{f".{suffix}": "" for suffix in pictures if suffix not in named}}


def _index(shard: Path, keep: bool) -> np.ndarray[Any, Any]:
    keep_from = _KEEP_FROM if keep else math.inf
    return indexed("tar", shard, lambda file, tell: index_tar(file, tell, shard), keep_from)["starts"]


def index_tar(file: BinaryIO, tell: Tell, shard: Path) -> Arrays:
    """Where samples begin, and where the last ends. UserError for a tar that is packed, broken or cut off."""
    starts, last, end = array("q"), None, 0
    size = file.seek(0, 2)
    file.seek(0)
    with _opened(file, shard) as tar:
        try:
            while (member := tar.next()) is not None:
                # else it remembers each member; the stubs don't know the list
                tar.members.clear()  # type: ignore[attr-defined]
                if member.offset_data + member.size > size:
                    raise UserError(f"{shard}: ends in the middle of {member.name}; was it cut off?")
                if not member.isdir() and _key(member.name) != last:
                    last = _key(member.name)
                    starts.append(member.offset)
                end = tar.offset
                tell(end)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{shard}: not a sound tar ({first_line(error)}), at byte {end}") from None
    file.seek(end)
    rest = file.read(2 * _BLOCK)
    if not rest:
        raise UserError(f"{shard}: has no end; was it cut off?")
    while rest:
        if rest.strip(b"\0"):
            raise UserError(f"{shard}: something that is no member begins at byte {end} or behind it")
        rest = file.read(1 << 20)
    starts.append(end)
    return {"starts": np.array(starts, np.int64)}


def _open(shard: Path) -> BinaryIO:
    try:
        return shard.open("rb")
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None


def _opened(file: BinaryIO, shard: Path) -> tarfile.TarFile:
    """A tar from where its file stands."""
    try:
        return tarfile.TarFile(fileobj=file, mode="r", errorlevel=2)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: not a tar, or a compressed one; unpack it ({first_line(error)})") from None


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
