"""Data sets of Hugging Face's `datasets`: Parquet, Arrow, folders that it saved, and ids of its hub."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from data.index import fingerprint
from data.key_map import KeyMap
from data.pictures import ImageBytes
from data.records import Record, find_image
from data.rows import Source, image_folder
from vlm.errors import UserError, first_line

HUB = "hub:"


class Columns(Source):
    """Rows whose columns are the keys of a row format; Image features come as bytes or paths, never decoded here.

    Arrow files are mapped into memory, Parquet is turned into Arrow once, in the cache of `datasets`.
    """

    holds_images = True

    def __init__(
        self,
        path: Path,
        files: list[Path],
        images: Path | None = None,
        row_format: str | None = None,
        split: str = "",
        columns: KeyMap = (),
    ) -> None:
        """files: Parquet or Arrow files, or one folder of `save_to_disk`; none for an id of the hub."""
        self._data = open_columns(path, files, split)
        super().__init__(path, images or image_folder_of(path, files), row_format, columns)
        self._files, self.split, self.format = files, split, "hf"
        self._name = named(path, split)
        if not len(self):
            raise UserError(f"{path}: no rows in it")

    def __reduce__(self) -> tuple[type[Source], tuple[Any, ...]]:
        return type(self), (self.path, self._files, self.images, self.row_format, self.split, self.columns)

    def files(self) -> list[Path]:
        return self._files

    def fingerprint(self) -> str:
        if not self._files:
            ends = [self._data[index].to_pylist() for index in (0, len(self) - 1)]
            return fingerprint([], str(self.path), self.split, len(self), ends)
        return fingerprint([file for one in self._files for file in ([one] if one.is_file() else _arrow_files(one))])

    def __len__(self) -> int:
        return len(self._data)

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        try:
            (row,) = self._data[index].to_pylist()
        except Exception as error:  # whatever a broken file makes of Arrow
            raise UserError(f"{self.where(index)}: cannot be read ({first_line(error)})") from None
        return {key: value for key, value in row.items() if value is not None}

    @property
    def has_images(self) -> bool:
        return "image" in self._data.column_names

    def without_images(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        """All rows in order without the columns that may hold images, and what the row's `image` is called, if any.

        Images are not read: of a memory map only the pages that are looked at are.
        """
        names = [name for name in self._data.column_names if name not in self._folded and name != "image"]
        first = 0
        for table in self._data.iter(batch_size=1000):
            there = table["image"].is_valid().to_pylist() if self.has_images else [False] * len(table)
            for number, (row, shown) in enumerate(zip(table.select(names).to_pylist(), there, strict=True), first):
                yield row, f"row {number}" if shown else None
            first += len(table)

    def image(self, index: int) -> bytes:
        """The encoded image in a row's column `image`."""
        found = unfold(self.row(index).get("image"), self.where(index))
        if isinstance(found, ImageBytes):
            return found.data
        if not isinstance(found, str):
            raise UserError(f"{self.where(index)}: no image in it")
        return find_image(self.where(index), found, self.images).read_bytes()

    def read(self, index: int, lenient: bool = False) -> Record:
        where = self.where(index)
        return self.record(unfold_row(self.row(index), self._folded, where), where, lenient)

    @cached_property
    def _folded(self) -> frozenset[str]:
        return image_columns(self._data.data.schema)


def named(path: Path, split: str) -> str:
    """What rows are named by: other splits of a data set are other rows."""
    return f"{path}@{split}" if split else str(path)


def _arrow_files(folder: Path) -> list[Path]:
    """Of a folder that was saved."""
    return sorted(folder.rglob("*.arrow"))


def image_folder_of(path: Path, files: Sequence[Path]) -> Path:
    """The folder that paths of pictures are relative to."""
    if path.exists():
        return image_folder(path)
    if files:
        return files[0].parent
    import datasets  # images of a data set of the hub lie where it was downloaded to

    return Path(datasets.config.HF_CACHE_HOME)


def image_columns(schema: Any) -> frozenset[str]:
    """The columns of an Arrow schema that may hold images: a look through all values of the others takes long."""
    import pyarrow as pa

    def plain(kind: Any) -> bool:
        if pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return all(plain(kind.field(number).type) for number in range(kind.num_fields))
        return bool(pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))

    return frozenset(column.name for column in schema if not plain(column.type))


def unfold_row(row: dict[str, Any], columns: frozenset[str], where: str) -> dict[str, Any]:
    """The row without what isn't there, its images as `unfold` gives them."""
    held = ((key, value) for key, value in row.items() if value is not None)
    return {key: unfold(value, where, key) if key in columns else value for key, value in held}


def unfold(value: Any, where: str, name: str = "image") -> Any:
    """{"bytes", "path"} of an Image feature, anywhere in a row -> ImageBytes, or the path."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return ImageBytes(value["bytes"], _name(value, where, name)) if value["bytes"] else value["path"]
        return {key: unfold(inner, where, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [unfold(inner, where, f"{name} {number}") for number, inner in enumerate(value)]
    return ImageBytes(value, f"{where}.{name}") if isinstance(value, bytes) else value


def _name(value: dict[str, Any], where: str, name: str) -> str:
    path = value["path"]
    return f"{where}.{path if isinstance(path, str) and path else name}"


def open_columns(path: Path, files: Sequence[Path], split: str, streaming: bool = False) -> Any:
    """A data set of the library, its rows as Arrow tables."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: needs the library `datasets` (pip install 'vlm[train]')") from None
    # else each file of one's own that is opened is told to a server of the library's, or waited for without a network
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        if not files:
            found = _from_hub(str(path), split, streaming)
        elif files[0].is_dir():
            if streaming:
                raise UserError(f"{path}: a folder that was saved isn't streamed; its rows are read where they are")
            found = _one_split(datasets.load_from_disk(str(files[0])), path, split)
        else:
            kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
            named = {"train": [escape(str(file)) for file in files]}  # the library takes paths for patterns
            found = datasets.load_dataset(kind, data_files=named, split="train", streaming=streaming)
        return found.with_format("arrow")
    except UserError:
        raise
    except Exception as error:  # the library fails in its own, many ways
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _from_hub(name: str, split: str, streaming: bool) -> Any:
    """hub:owner/name, hub:owner/name:config"""
    import datasets

    name, _, config = name.removeprefix(HUB).partition(":")
    if split:
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    return _one_split(datasets.load_dataset(name, config or None, streaming=streaming), Path(f"{HUB}{name}"), split)


def _one_split(found: Any, path: Path, split: str) -> Any:
    import datasets

    if not isinstance(found, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split:
            raise UserError(f"{path}: has no splits, so none is called {split}")
        return found
    if split and split not in found:
        raise UserError(f"{path}: no split {split}; there are {', '.join(found)}")
    if not split and len(found) > 1:
        raise UserError(f"{path}: holds the splits {', '.join(found)}; name one: {path}@{next(iter(found))}")
    return found[split or next(iter(found))]
