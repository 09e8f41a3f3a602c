"""`vlm data convert`: any source as canonical JSONL or WebDataset shards, in parts that a killed run keeps."""

import base64
import errno
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from data.pictures import ImageRef, read_bytes
from data.progress import progress
from data.records import Record
from data.rows import Source
from data.workers import Workers
from vlm.errors import UserError, first_line
from vlm.images import image_format

Target = Literal["messages", "webdataset"]
ROWS_OF_A_PART = 5000
SAMPLES_OF_A_SHARD = 1000


@dataclass(frozen=True)
class Converted:
    """What came of it: rows written and rows put aside, which together are all rows of the source."""

    good: int
    bad: int
    quarantine: Path


@dataclass(frozen=True)
class Job:
    """source -> out (a .jsonl file, or a folder of tars), in parts of `size` rows."""

    source: Source
    out: Path
    to: Target
    size: int

    @property
    def parts(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def quarantine(self) -> Path:
        return self.out.with_name(f"{self.out.name.removesuffix('.jsonl')}.quarantine.jsonl")

    def count(self) -> int:
        return -(-len(self.source) // self.size)

    def report(self, number: int) -> Path:
        """Written last of a part: it is finished."""
        return self.parts / f"{number:06d}.json"

    def rows(self, number: int) -> Path:
        return self.parts / f"{number:06d}.jsonl"

    def shard(self, number: int) -> Path:
        return self.out / f"{number:06d}.tar"

    def write_part(self, number: int) -> int:
        bad: list[dict[str, str]] = []
        good = 0
        path = self.rows(number) if self.to == "messages" else self.shard(number)
        with _aside(path) as aside, (Lines if self.to == "messages" else Shard)(self, aside) as writer:
            for index in range(number * self.size, min((number + 1) * self.size, len(self.source))):
                try:
                    writer.add(index, self.source[index])
                    good += 1
                except UserError as error:
                    where = self.source.where(index)
                    bad.append({"where": where, "reason": str(error).removeprefix(f"{where}: ")})
        if not good and self.to == "webdataset":
            path.unlink()  # a tar without samples is of no use to anybody
        _write(self.report(number), json.dumps({"good": good, "bad": bad}).encode())
        return number

    def state(self) -> dict[str, Any]:
        """What finished parts hold for: of another source or another plan they're of no use."""
        files = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in self.source.files()]
        images = str(self.source.images.absolute())
        columns = [[name, list(keys)] for name, keys in self.source.columns]
        told = (self.source.format, images, len(self.source), columns, self.to, self.size)
        names = ("files", "format", "images", "rows", "columns", "to", "size")
        return dict(zip(names, (files, *told), strict=True))


def convert(source: Source, out: Path, to: Target = "messages", size: int | None = None, workers: int = 0) -> Converted:
    """Writes a source anew. Broken rows go to OUT.quarantine.jsonl; a run that was stopped goes on where it was."""
    job = Job(source, out, to, size or (ROWS_OF_A_PART if to == "messages" else SAMPLES_OF_A_SHARD))
    if to == "messages" and out.suffix != ".jsonl":
        raise UserError(f"{out}: rows are written to a file that ends in .jsonl")
    if out.absolute() in (file.absolute() for file in source.files()):
        raise UserError(f"{out}: is what is converted")
    try:
        return _write_parts(job, workers)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        later = "; the same command goes on with what is finished" if full else ""
        raise UserError(f"{out}: cannot be written ({error.strerror or first_line(error)}){later}") from error


def _write_parts(job: Job, workers: int) -> Converted:
    _prepare(job)
    numbers = [number for number in range(job.count()) if not job.report(number).exists()]
    kept = job.count() - len(numbers)
    if kept:
        print(f"{job.out}: {kept} of {job.count()} parts are there from before", file=sys.stderr)
    make = partial(Job, job.source, job.out, job.to, job.size)
    count = min(workers, len(numbers)) if len(numbers) > 1 else 0
    with progress(f"writing {job.out.name}", job.count()) as tell, Workers(make, count) as pool:
        for done, _ in enumerate(pool.map("write_part", zip(numbers)), start=kept + 1):
            tell(done)
    return _finish(job)


def _prepare(job: Job) -> None:
    """Finished parts of the same plan stay, others go; what somebody else wrote is left alone."""
    plan, state = job.parts / "plan.json", job.state()
    if plan.is_file():
        if json.loads(plan.read_text()) == state:
            for left in (*job.out.glob("*.tar.*.new"), *(job.out.parent / "images").glob("*/*.new")):
                left.unlink()  # of processes that were killed
            return
        print(f"{job.parts}: parts of another conversion; it begins anew", file=sys.stderr)
        shutil.rmtree(job.parts)
        for shard in job.out.glob("[0-9]*.tar") if job.to == "webdataset" else ():
            shard.unlink()
    if job.out.exists() and not (job.out.is_dir() and job.to == "webdataset" and not any(job.out.iterdir())):
        raise UserError(f"{job.out}: is there already; remove it, or name another place")
    job.parts.mkdir(parents=True, exist_ok=True)
    if job.to == "webdataset":
        job.out.mkdir(parents=True, exist_ok=True)
    _write(plan, json.dumps(state).encode())


class Lines:
    """Rows one a line; images that the source itself holds are copied beside, named by their content. Those that a row
    of text holds (data URLs) stay in it, as others keep their folder."""

    def __init__(self, job: Job, path: Path) -> None:
        self.job, self.file = job, path.open("wb")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, index: int, record: Record) -> None:
        if self.job.source.holds_images:
            names = [_copy(image, self.job.out.parent / "images") for image in record.images]
        else:
            root = self.job.source.images.resolve()
            names = [
                str(image.relative_to(root)) if isinstance(image, Path) else _data_url(image) for image in record.images
            ]
        self.file.write(as_line(record, names))


class Shard:
    """A tar of samples INDEX.json, INDEX.0.jpg, INDEX.1.png ..."""

    def __init__(self, job: Job, path: Path) -> None:
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (__exit__ closes it)

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *error: object) -> None:
        self.tar.close()

    def add(self, index: int, record: Record) -> None:
        images = [_read(image) for image in record.images]
        names = [f"{number}{suffix}" for number, (_, suffix) in enumerate(images)]
        files = [
            ("json", as_line(record, names)),
            *((name, data) for name, (data, _) in zip(names, images, strict=True)),
        ]
        for suffix, data in files:
            member = tarfile.TarInfo(f"{index:09d}.{suffix}")
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))


def as_line(record: Record, names: list[str]) -> bytes:
    """The record as a row that reads back to it, with the images by these names."""
    rest = iter(names)
    messages = [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in record.messages
    ]
    row: dict[str, Any] = {"messages": messages}
    if record.kind == "document":
        parts = messages[0]["content"]
        row = {"images": [part.get("image") for part in parts], "texts": [part.get("text") for part in parts]}
    elif record.captions:
        row["captions"] = record.captions
    if record.answers:
        row["answers"] = record.answers
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise UserError(f"{record.where}: the name of an image isn't Unicode") from None


def _read(image: ImageRef) -> tuple[bytes, str]:
    """An image's bytes and the suffix that fits them. UserError for what is no image by its header."""
    data = read_bytes(image)
    return data, f".{image_format(data, str(image)).lower().replace('jpeg', 'jpg')}"


def _data_url(image: ImageRef) -> str:
    data = read_bytes(image)
    return f"data:image/{image_format(data, str(image)).lower()};base64,{base64.b64encode(data).decode()}"


def _copy(image: ImageRef, folder: Path) -> str:
    data, suffix = _read(image)
    digest = sha256(data).hexdigest()[:32]
    name = f"{digest[:2]}/{digest}{suffix}"
    if not (folder / name).exists():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, data)
    return name


def _finish(job: Job) -> Converted:
    """Puts the parts together, in order, and clears up."""
    good, bad = 0, list[bytes]()
    for number in range(job.count()):
        report = json.loads(job.report(number).read_text())
        good += report["good"]
        bad += [json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for row in report["bad"]]
    assert good + len(bad) == len(job.source)
    if job.to == "messages" and not job.out.exists():
        with _aside(job.out) as path, path.open("wb") as whole:
            for number in range(job.count()):
                with job.rows(number).open("rb") as part:
                    shutil.copyfileobj(part, whole)
    if bad:
        _write(job.quarantine, b"".join(bad))
    else:
        job.quarantine.unlink(missing_ok=True)
    shutil.rmtree(job.parts)
    return Converted(good, len(bad), job.quarantine)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place to write to that becomes `path` when all has gone well, and nothing else."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with _aside(path) as aside:
        aside.write_bytes(content)
