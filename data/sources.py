"""`open_source`: the rows of whatever people have, by number; its format is found where it isn't given."""

import re
from itertools import product
from pathlib import Path
from typing import Any

from data.columns import HUB, Columns
from data.flickr import Grouped, Karpathy, Tokens
from data.formats import ROW_FORMATS
from data.key_map import KeyMap
from data.lines import Elements, Lines
from data.official import COCO, GQA, Official, TextVQA, VQAv2
from data.row_keys import meaning_of
from data.rows import Source
from data.scanner import Scanner
from data.shards import Shards
from data.streams import ColumnStream, ShardStream, Stream
from data.tables import Table
from data.unpack import unpacked
from vlm.errors import UserError, first_line

OFFICIAL: dict[str, type[Official]] = {"vqav2": VQAv2, "coco": COCO, "textvqa": TextVQA, "gqa": GQA}
FORMATS = (*ROW_FORMATS, *OFFICIAL, "flickr", "hf", "webdataset")
ADDRESS = re.compile(r"(?!hub:)[a-z][a-z0-9+]+:")
_BLANK = b"\xef\xbb\xbf \t\r\n"
_PACKED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip", ".7z")
_ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_PACKED_ROWS = ".jsonl.gz, .json.gz, .csv.gz and .tsv.gz"
ROW_LEADS = ("messages", "conversations", "captions", "question")
_SPLITS = {"training": "train", "testing": "test", "val": "validation", "valid": "validation", "dev": "validation"}
_SPLIT = re.compile(r"(?:^|[-_.])(train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?|dev)(?=[-_.\d]|$)")
# An array of a file that is one object, what its elements have, and the format that this tells.
_ARRAYS = (
    ("questions", "question_id", "vqav2"),
    ("annotations", "question_id", "annotations"),
    ("images", "sentences", "flickr"),
    ("images", "file_name", "coco"),
    ("annotations", "caption", "coco"),
    ("data", "question", "textvqa"),
)
__all__ = ["FORMATS", "Source", "open_source"]


def open_data(
    name: str, root: Path, images: Path | None, format: str | None, stream: bool, columns: KeyMap = ()
) -> Source | Stream:
    """What a stage's data names: local rows by number, or a stream (`stream`, or tars by http(s) address).

    root: what paths are relative to; columns: keys of other names.
    """
    if ADDRESS.match(name):
        if not re.match(r"https?://.+\.tar$", name):
            raise UserError(f"{name}: of addresses, http(s)://... of .tar files are read")
        return ShardStream(Path(name), expand_braces(name), format if format in ROW_FORMATS else None, columns)
    path = name if name.startswith(HUB) else str(root / name)
    if not stream:
        return open_source(path, images, format, columns=columns)
    rows = format if format in ROW_FORMATS else None
    if name.startswith(HUB):
        hub, _, split = name.partition("@")
        return ColumnStream(Path(hub), (), images, rows, split, columns)
    source = Path(path)
    files = sorted(source.glob("*.parquet")) if source.is_dir() else expand(path)
    _check_plain(files)
    if not files or any(file.suffix != ".parquet" for file in files):
        raise UserError(f"{path}: hub:... and Parquet files are streamed; other local files are read row by row anyway")
    return ColumnStream(source, files, images, rows, columns=columns)


def open_source(
    path: str | Path,
    images: Path | None = None,
    format: str | None = None,
    whole: bool = True,
    columns: KeyMap = (),
) -> Source:
    """The rows of a file, a folder or a data set of the hub; the format is found where it isn't given.

    path: a file or folder; several tars or Parquet files as `a-{000..012}.tar` or `a-*.tar`; QUESTIONS.json+ANNOTATIONS
    .json; hub:owner/name[:config]; a split is named behind @. images: the folder that image paths are relative to.
    whole: refuses a JSON array that breaks off, as nobody knows what is lost; else its end is one broken row. columns:
    keys of other names than those that formats know.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    if ADDRESS.match(str(path)):
        raise UserError(
            f"{path}: what lies at an address has no row numbers; a recipe's data can be streamed from there"
        )
    try:
        source = _open(str(path), images, format, columns)
    except OSError as error:  # a name too long, a folder that may not be read
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    rows = format if format in ROW_FORMATS else None
    if format is not None and rows is None and source.format != format:
        raise UserError(f"{path}: not a file of {format}, but of {source.format}")
    if columns and source.columns != columns:
        raise UserError(f"{path}: a file of {source.format}, which has its own names; columns is for rows")
    if whole and source.cut:
        where = source.where(len(source) - 1)
        raise UserError(f"{where}: {source.cut}; `vlm data convert` saves the rows before it")
    source.check_format()
    return source


def _open(name: str, images: Path | None, format: str | None, columns: KeyMap) -> Source:
    path = Path(name)
    rows = format if format in ROW_FORMATS else None
    if path.is_dir():
        return _open_folder(path, images, rows, columns)
    if path.exists():
        return _open_file(path, images, format, columns)
    if name.startswith(HUB):
        hub, _, split = name.partition("@")
        return Columns(Path(hub), [], images, rows, split, columns)
    questions, plus, annotations = name.partition("+")
    if plus and Path(questions).is_file():
        beside = Path(questions).with_name(annotations) if "/" not in annotations else Path(annotations)
        return VQAv2(Path(questions), images, beside if beside.is_file() else Path(annotations))
    whole, at, split = name.rpartition("@")
    if at and Path(whole).is_dir():
        return _open_folder(Path(whole), images, rows, columns, split)
    if at and Path(whole).is_file():
        if object_format(Path(whole)) != "flickr":
            raise UserError(f"{whole}: has no splits, so none is called {split}")
        return Karpathy(Path(whole), images, split)
    if re.search(r"[{*?\[]", name):
        return _open_files(path, expand(name), images, rows, columns)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w+]+)?", name) and not path.parent.is_dir() and not _has_suffix(path):
        try:
            return _open(f"{HUB}{name}", images, format, columns)
        except UserError as error:
            raise UserError(f"{path}: no such file or folder here, and as an id of the hub: {error}") from None
    raise UserError(f"{path}: no such data file")


def _open_file(path: Path, images: Path | None, format: str | None, columns: KeyMap) -> Source:
    rows = format if format in ROW_FORMATS else None
    _check_plain([path])
    inner = path.with_suffix("") if path.suffix == ".gz" else path  # by its name
    if inner.suffix in _PACKED or (inner != path and inner.suffix not in _ROWS):
        raise UserError(f"{path}: a packed file can't be read row by row; unpack it first ({_PACKED_ROWS} are read)")
    if path.suffix in (".tar", ".parquet", ".arrow"):
        return _open_files(path, [path], images, rows, columns)
    if inner.suffix in (".csv", ".tsv"):
        table = Table(path, images, rows, columns)
        return Grouped(table) if format == "flickr" else table
    held = unpacked(path) if inner != path else path
    with held.open("rb") as file:
        head = file.read(1 << 16)
    opening = head.lstrip(_BLANK)[:1]
    if not opening and len(head) == held.stat().st_size:
        raise UserError(f"{path}: no rows in it")
    if re.match(rb"(\xef\xbb\xbf)?[^\t\n#]+#\d+\s*\t", head):
        return Grouped(Tokens(path, images))
    if path.suffix == ".txt" and opening not in (b"[", b"{"):
        return Grouped(Table(path, images))
    if opening == b"[":
        return Elements(path, images, rows, columns)
    kind = object_format(held) if opening == b"{" and inner.suffix not in (".jsonl", ".ndjson") else None
    if kind is not None and held != path:
        raise UserError(f"{path}: a packed official file; unpack it first ({_PACKED_ROWS} are read, as rows)")
    if kind == "annotations":
        raise UserError(f"{path}: a file of annotations; name that of the questions, answers are found beside it")
    if kind == "flickr":
        return Karpathy(path, images)
    return OFFICIAL[kind](path, images) if kind else Lines(path, images, rows, columns)


def _open_folder(path: Path, images: Path | None, rows: str | None, columns: KeyMap, split: str = "") -> Source:
    """A folder that `datasets` saved, of Parquet or Arrow files, of tars, or of images with a metadata file."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Columns(path, [path], images, rows, split, columns)
    for folder in (path, path / "data"):
        for suffix in ("tar", "parquet", "arrow"):
            if files := sorted(folder.glob(f"*.{suffix}")):
                return _open_files(path, choose_split(path, files, split), images, rows, columns, split)
    names = ("metadata.jsonl", "metadata.csv")
    for file in (path / name for name in names):
        if file.is_file():
            return (Lines if file.suffix == ".jsonl" else Table)(file, images or path, rows, columns)
    if below := sorted({file.parent.name for name in names for file in path.glob(f"*/{name}")}):
        raise UserError(f"{path}: its metadata files are in {', '.join(below)}; name one of these folders")
    raise UserError(f"{path}: no such data file; of a folder tars, Parquet or Arrow files, or {names[0]} are read")


def _open_files(
    path: Path, files: list[Path], images: Path | None, rows: str | None, columns: KeyMap, split: str = ""
) -> Source:
    _check_plain(files)
    suffixes = {file.suffix for file in files}
    if suffixes == {".tar"}:
        return Shards(path, files, images, rows, columns=columns)
    if suffixes in ({".parquet"}, {".arrow"}):
        return Columns(path, files, images, rows, split, columns)
    raise UserError(f"{path}: several files are read when all are .tar, or all .parquet, or all .arrow")


def _check_plain(files: list[Path]) -> None:
    """Whoever opens a pipe waits for somebody to write into it."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no plain file but a pipe, a device or a dead link; rows are read from files")


def expand_braces(name: str) -> list[str]:
    """{000..012} and {train,val} in a name, written out."""
    pieces = re.split(r"\{([^{}]*)\}", name)
    choices: list[list[str]] = [[piece] for piece in pieces]
    for place in range(1, len(pieces), 2):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", pieces[place])
        if numbers:
            first, last = numbers.groups()
            if int(last) - int(first) > 1_000_000:
                raise UserError(f"{name}: more than a million files")
            choices[place] = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            choices[place] = pieces[place].split(",")
    return ["".join(one) for one in product(*choices)]


def expand(name: str) -> list[Path]:
    """The files of a list with braces or * in it, which a folder or file that is there may have in its own name.

    UserError when one isn't there.
    """
    whole, files = Path(name), list[Path]()
    if whole.is_file():
        return [whole]
    folder = next((parent for parent in whole.parents if parent.is_dir()), Path())
    for one in expand_braces(str(whole.relative_to(folder))):
        path = folder / one
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not found or not all(file.is_file() for file in found):
            raise UserError(f"{path}: no such data file")
        files += found
    return files


def choose_split(path: Path, files: list[Path], split: str) -> list[Path]:
    """Files of one split, where their names tell splits apart: train and test mixed up would be found too late."""
    found: dict[str, list[Path]] = {}
    for file in files:
        named = _SPLIT.search(file.stem)
        found.setdefault(_SPLITS.get(named[1], named[1]) if named else "", []).append(file)
    wanted = _SPLITS.get(split, split)
    if split:
        if wanted not in found:
            raise UserError(f"{path}: no files of {split}; there are {', '.join(filter(None, found)) or 'no splits'}")
        return found[wanted]
    if len(found) > 1:
        names = [name for name in found if name]
        raise UserError(f"{path}: holds files of {', '.join(names)}; name one: {path}@{names[0]}")
    return files


def object_format(path: Path) -> str | None:
    """The format of a file that is one JSON object, by its first keys; None for rows one a line."""
    with path.open("rb") as file:
        scanner = Scanner(file, path)
        try:
            for key in scanner.members():
                if meaning_of(str(key)) in ROW_LEADS or key in ("role", "id"):
                    break
                if scanner.peek() == "[":
                    for number in scanner.members():
                        _, _, value = scanner.value()
                        if number == 0 and (found := _array_format(str(key), value)):
                            return found
                elif {"imageId", "question"} <= _keys(scanner.value()[2]):
                    return "gqa"
        except UserError:
            return None  # each line will say for itself what is wrong with it
        file.seek(0)
        if file.readline(100).lstrip(b"\xef\xbb\xbf").strip() == b"{":
            raise UserError(f"{path}: one JSON object over several lines; rows are one a line, or elements of an array")
    return None


def _array_format(key: str, row: Any) -> str | None:
    """The format of a file by the first element of an array in it."""
    for array, needed, name in _ARRAYS:
        if key == array and needed in _keys(row):
            return name
    return None


def _keys(row: Any) -> set[str]:
    return set(row) if isinstance(row, dict) else set()


def _has_suffix(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".tar", ".parquet", ".arrow", *_PACKED)
