"""`vlm data check`: everything that can be known of rows and their images before money is spent on them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from data.bad import Bad
from data.check_rows import HEADER, ROW, SEEN, SHOWN, Checker, Numbers, Place
from data.looks import alike
from data.progress import progress
from data.sources import Source
from data.workers import Workers
from vlm.errors import UserError
from vlm.threads import usable_cores

if TYPE_CHECKING:
    from data.check_model import ModelSpec

CHUNK = 1000  # rows that a worker reads at a time
FEW = 64  # headers, pictures, or rows that a model reads
WORTH_A_PROCESS = 5000  # rows or images; a new process takes a second to start, longer with a model
SAMPLE = 500  # images that are decoded unless all are asked for
MOST_LISTED = 1000  # groups of duplicates and pairs of look-alikes that a report lists; all are counted


@dataclass(frozen=True)
class BadRow(Bad):
    number: int


@dataclass(frozen=True)
class Shown:
    """An image as a row shows it. source: 0 for the source checked, then those it is compared with."""

    row: int
    place: int
    where: str
    name: str
    source: int = 0


@dataclass(frozen=True)
class Alike:
    """An image of the source and one it must not resemble; bits: how far apart they look (0: the same)."""

    ours: Shown
    theirs: Shown
    bits: int


@dataclass(frozen=True)
class Table:
    """All that is known of a source. rows: ROW; shown: SHOWN; first: for each distinct image, which of `shown` shows it
    first; headers: HEADER and looks: SEEN of each distinct image; decoded: which of them were; ignored: how many good
    rows
    have each key that nothing is read from."""

    source: Source
    rows: Numbers
    shown: Numbers
    first: Numbers
    headers: Numbers
    looks: Numbers
    decoded: Numbers
    bad: list[BadRow]
    bad_images: int
    ignored: dict[str, int]

    def place(self, image: int) -> Place:
        shown = self.shown[self.first[image]]
        return int(shown["row"]), int(shown["place"])

    def show(self, image: int, source: int = 0) -> Shown:
        row, place = self.place(image)
        return Shown(row, place, self.source.where(row), str(self.source[row].images[place]), source)


@dataclass(frozen=True)
class Compared:
    """What the source shares with another, which is to be kept apart from it (questions that a model is scored by)."""

    path: str
    rows: int
    bad: int
    same_rows: int
    same_images: int
    alike: int
    row_pairs: list[tuple[str, str]]
    image_pairs: list[Alike]


@dataclass(frozen=True)
class Findings:
    table: Table
    model: str | None = None
    context: int | None = None
    image_tokens: int | None = None
    same_rows: list[list[str]] = field(default_factory=list)
    same_ids: list[list[str]] = field(default_factory=list)
    same_images: list[list[Shown]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    compared: list[Compared] = field(default_factory=list)
    others: list[Source] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.table.rows)

    @property
    def bad_share(self) -> float:
        return len(self.table.bad) / max(1, self.num_rows)


def check_source(
    source: Source,
    spec: "ModelSpec | None" = None,
    decode_all: bool = False,
    against: Sequence[Source] = (),
    workers: int | None = None,
) -> Findings:
    """Reads every row, every image's header, and a sample of the images (all, where they're compared with others).

    workers: processes to use; None as many as are worth their start.
    """
    model = context = image_tokens = None
    if spec is not None:
        from data.check_model import NO_LIMIT, Reader

        reader = Reader(spec)  # says here, not in a worker, why a model can't be read
        model, context = spec.model, None if reader.context == NO_LIMIT else reader.context
        image_tokens = None if reader.processor is not None else spec.image_tokens
    table = examine(source, spec, decode_all or bool(against), workers)
    others = [examine(other, None, True, workers) for other in against]
    same_images, images = _same_images(table, workers)
    same_rows, rows = _same(table, "digest")
    same_ids, ids = _same(table, "id")
    return Findings(
        table,
        model,
        context,
        image_tokens,
        same_rows,
        same_ids,
        same_images,
        {"same_rows": rows, "same_ids": ids, "same_images": images},
        [compare(table, other, number) for number, other in enumerate(others, start=1)],
        list(against),
    )


def examine(source: Source, spec: "ModelSpec | None", decode_all: bool, workers: int | None) -> Table:
    ids = _have_ids(source)
    count = _processes(len(source) * (1 if spec is None else 10), workers)
    with Workers(partial(Checker, source, spec, ids), count) as pool:
        step = CHUNK if spec is None else FEW
        tasks = [(start, min(start + step, len(source))) for start in range(0, len(source), step)]
        parts = []
        with progress(f"rows of {source.path.name}", len(source)) as tell:
            for (_, stop), part in zip(tasks, pool.map("rows", iter(tasks)), strict=True):
                parts.append(part)
                tell(stop)
        rows = np.concatenate([part.rows for part in parts]) if parts else np.zeros(0, ROW)
        shown = np.concatenate([part.shown for part in parts]) if parts else np.zeros(0, SHOWN)
        reasons = {number: reason for part in parts for number, reason in part.bad}
        _, first, which = np.unique(shown["key"], return_index=True, return_inverse=True)
        places = [(int(entry["row"]), int(entry["place"])) for entry in shown[first]]
        # a worker parses a row once for all of its images
        order = sorted(range(len(places)), key=places.__getitem__)
        broken: dict[int, str] = {}
        headers = np.zeros(len(places), HEADER)
        for images, (found, bad) in _in_parts(pool, "headers", places, order, f"images of {source.path.name}"):
            headers[images] = found
            broken.update((images[number], reason) for number, reason in bad)
        sound = [image for image in order if image not in broken]
        if not decode_all and len(sound) > SAMPLE:
            sound = sorted(
                np.random.default_rng(0).choice(sound, SAMPLE, replace=False).tolist(), key=places.__getitem__
            )
        looks, decoded = np.zeros(len(places), SEEN), np.zeros(len(places), bool)
        decoded[sound] = True
        for images, (found, bad) in _in_parts(
            pool, "pictures", places, sound, f"decoding images of {source.path.name}"
        ):
            looks[images] = found
            broken.update((images[number], reason) for number, reason in bad)
    if broken:
        hit = np.isin(which, list(broken))
        for row, image in zip(shown["row"][hit].tolist(), which[hit].tolist(), strict=True):
            reasons.setdefault(row, broken[image])
        rows["good"][list(reasons)] = False
    bad_rows = [BadRow(source.where(number), reasons[number], number) for number in sorted(reasons)]
    ignored: Counter[str] = Counter()
    for part in parts:
        ignored.update(part.ignored)
    told = dict(sorted(ignored.items(), key=lambda item: (-item[1], item[0])))
    return Table(source, rows, shown, first, headers, looks, decoded, bad_rows, len(broken), told)


def compare(table: Table, other: Table, number: int) -> Compared:
    """Rows, images and look-alikes that two sources share."""
    row_pairs: list[tuple[str, str]] = []
    same_rows = 0
    theirs = {int(digest): row for row, digest in enumerate(other.rows["digest"]) if digest}
    for row, digest in enumerate(table.rows["digest"].tolist()):
        if digest and digest in theirs:
            same_rows += 1
            if len(row_pairs) < MOST_LISTED:
                row_pairs.append((table.source.where(row), other.source.where(theirs[digest])))
    ours, those = np.flatnonzero(table.looks["good"]), np.flatnonzero(other.looks["good"])
    pairs = alike(other.looks["look"][those], table.looks["look"][ours])
    pairs.sort(key=lambda pair: pair[2])
    listed = [
        Alike(table.show(int(ours[known])), other.show(int(those[one]), number), bits)
        for one, known, bits in pairs[:MOST_LISTED]
    ]
    same = sum(
        table.headers[ours[known]]["digest"] == other.headers[those[one]]["digest"]
        and table.headers[ours[known]]["bytes"] == other.headers[those[one]]["bytes"]
        for one, known, _ in pairs
    )
    found = len({one for one, _, _ in pairs})
    return Compared(
        str(other.source.path), len(other.rows), len(other.bad), same_rows, int(same), found, row_pairs, listed
    )


def _processes(work: int, wanted: int | None) -> int:
    """How many do the work: none but this one where they would hardly have started when it's done."""
    return wanted if wanted is not None else usable_cores() if work >= WORTH_A_PROCESS else 0


def _in_parts(
    pool: Workers, method: str, places: Sequence[Place], images: Sequence[int], what: str
) -> Iterator[tuple[list[int], Any]]:
    parts = [list(images[start : start + FEW]) for start in range(0, len(images), FEW)]
    done = 0
    with progress(what, len(images)) as tell:
        tasks = (([places[image] for image in part],) for part in parts)
        for part, found in zip(parts, pool.map(method, tasks), strict=True):
            done += len(part)
            tell(done)
            yield part, found


def _same(table: Table, name: str) -> tuple[list[list[str]], int]:
    """Groups of good rows with the same digest, as far as they are listed, and how many rows repeat an earlier one."""
    known = np.flatnonzero((table.rows[name] != 0) & (table.rows["good"] | (name == "id")))
    groups, repeated = _groups(table.rows[name][known])
    return [[table.source.where(int(known[row])) for row in group] for group in groups[:MOST_LISTED]], repeated


def _same_images(table: Table, workers: int | None) -> tuple[list[list[Shown]], int]:
    """Groups of files with the same bytes. Sizes and first bytes are compared before any file is read whole."""
    headers = table.headers
    known = np.flatnonzero(headers["good"])
    cheap = headers["digest"][known] ^ headers["bytes"][known].astype("<u8")
    suspects = sorted((int(known[image]) for group in _groups(cheap)[0] for image in group), key=table.place)
    if not suspects:
        return [], 0
    digests = np.zeros(len(headers), "<u8")
    with Workers(partial(Checker, table.source), _processes(len(suspects), workers)) as pool:
        places = [table.place(image) for image in range(len(headers))]
        for images, found in _in_parts(pool, "contents", places, suspects, "comparing images of the same size"):
            digests[images] = found
    whole = np.array(suspects)[digests[suspects] != 0]
    groups, repeated = _groups(digests[whole])
    return [[table.show(int(whole[image])) for image in group] for group in groups[:MOST_LISTED]], repeated


def _groups(values: Numbers) -> tuple[list[list[int]], int]:
    """Positions of values that occur more than once, grouped, in order; and how many repeat an earlier one."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    many = np.flatnonzero(counts[which] > 1)
    if not len(many):
        return [], 0
    order = many[np.argsort(which[many], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
    return sorted(group.tolist() for group in groups), len(values) - len(counts)


def _have_ids(source: Source) -> bool:
    """Whether one of the first rows has one, where rows are what is read of them."""
    if type(source).read is not Source.read:
        return False
    for number in range(min(20, len(source))):
        try:
            row = source.row(number)
        except UserError:
            continue
        if isinstance(row, dict) and "id" in row:
            return True
    return False
