"""Flickr8k and Flickr30k as published: token files and tables of captions, and Karpathy's splits (COCO's, too)."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.index import Arrays, indexed
from data.lines import Lines
from data.progress import Tell
from data.rows import FileRows, Source, find_name, keys_of, parse
from data.scanner import Scanner
from vlm.errors import UserError

FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images")


class Tokens(Lines):
    """Flickr8k.token.txt: `picture.jpg#0<TAB>caption` on each line."""

    def row(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        try:
            name, tab, caption = self._read(index).decode("utf-8-sig").strip().partition("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} of the line is no UTF-8") from None
        image, mark, number = name.rpartition("#")
        if not tab or not mark or not number.strip().isdigit():
            raise UserError(f"{where}: a line is picture.jpg#number, a tab and a caption, got {name[:80]!r}")
        return {"image": image, "caption": caption}


class Grouped(Source):
    """Captions of the same image as one row, named by where the first of them stands; broken rows stay alone."""

    def __init__(self, rows: Source) -> None:
        super().__init__(rows.path, rows.images, "captions")
        self.rows = rows
        keys = keys_of([self._image(index) for index in range(len(rows))])
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[group]  # of each row's group, by where its first row stands
        self._order = np.argsort(rank, kind="stable")
        self._bounds = np.concatenate(([0], np.cumsum(np.bincount(rank))))
        self.format = "flickr"

    def __reduce__(self) -> tuple[type[Source], tuple[Any, ...]]:
        return type(self), (self.rows,)

    def _image(self, index: int) -> str:
        try:
            return f"image {self.rows.row(index).get('image')}"
        except UserError:
            return f"broken row {index}"

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def where(self, index: int) -> str:
        return self.rows.where(int(self._order[self._bounds[index]]))

    def row(self, index: int) -> dict[str, Any]:
        members = self._order[self._bounds[index] : self._bounds[index + 1]]
        rows = [self.rows.row(int(member)) for member in members]
        name = str(rows[0].get("image"))
        captions = [row.get("caption") for row in rows]
        names = [name, *(f"{folder}/{name}" for folder in FOLDERS)]
        return {"image": find_name(self.images, names), "captions": captions}


class Karpathy(FileRows):
    """One split of dataset_flickr8k.json and its like: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}"""

    def __init__(self, path: Path, images: Path | None = None, split: str = "") -> None:
        """split: names joined by +; needed where the file has several."""
        self.split = split
        super().__init__(path, images, "captions")
        self.format = "flickr"

    def __reduce__(self) -> tuple[type[Source], tuple[Any, ...]]:
        return type(self), (self.path, self.images, self.split)

    def _index(self) -> Arrays:
        arrays = indexed("karpathy", self.path, self._build)
        names = [name.decode() for name in arrays["names"].tobytes().split(b"\n")]
        if not self.split and len(names) > 1:
            raise UserError(f"{self.path}: holds the splits {', '.join(names)}; name one: {self.path}@{names[0]}")
        if unknown := set(self.split.split("+")) - set(names) - {""}:
            raise UserError(f"{self.path}: no split {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        wanted = [names.index(name) for name in self.split.split("+")] if self.split else [0]
        self._chosen = np.flatnonzero(np.isin(arrays["splits"], wanted))
        return arrays

    def _build(self, file: BinaryIO, tell: Tell) -> Arrays:
        scanner = Scanner(file, self.path, tell)
        starts: list[int] = []
        splits: list[int] = []
        names: dict[str, int] = {}
        for key in scanner.members():
            if key != "images" or scanner.peek() != "[":
                scanner.value()
                continue
            for _ in scanner.members():
                start, end, row = scanner.value()
                split = str(row.get("split")) if isinstance(row, dict) else "None"
                splits.append(names.setdefault(split.replace("\n", " "), len(names)))
                starts.append(start)
            starts.append(end)
        joined = "\n".join(names).encode(errors="replace")
        return {
            "starts": np.array(starts, np.int64),
            "splits": np.array(splits, np.int32),
            "names": np.frombuffer(joined, np.uint8),
        }

    def __len__(self) -> int:
        return len(self._chosen)

    def where(self, index: int) -> str:
        return f"{self.path}[{self._chosen[index]}]"

    def row(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        row = parse(self._read(int(self._chosen[index])).rstrip(b" \t\r\n").removesuffix(b","), where.__str__)
        sentences = row.get("sentences") if isinstance(row, dict) else None
        if not isinstance(sentences, list) or not isinstance(row.get("filename"), str):
            raise UserError(f"{where}: an image needs a filename and sentences")
        name, folder = row["filename"], row.get("filepath")
        places = [f"{folder}/{name}"] if isinstance(folder, str) else []
        captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
        names = [*places, name, *(f"{other}/{name}" for other in FOLDERS)]
        return {"image": find_name(self.images, names), "captions": captions}
