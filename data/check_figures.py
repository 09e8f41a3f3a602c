"""What the numbers of a check come to: histograms, shares, what fits the context, how full packed rows would be."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.bad import kinds
from data.check import Findings, Table
from data.check_rows import Numbers

LONGEST = 20


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie in [edges[i], edges[i + 1]), the last edge included."""

    title: str
    edges: list[float]
    counts: list[int]
    median: float
    mean: float
    largest: float


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows as a model would read them. shortened: rows that lose turns to fit `context`; too_long: those
    that can't; fill: the share of real tokens in packed rows of `packed_into` times the context."""

    context: int | None
    tokens: int
    supervised: int
    shortened: int
    dropped_messages: int
    too_long: int
    fill: float | None
    packed_into: int


def histogram(title: str, values: Numbers, most: int) -> Histogram:
    """At most `most` bars; where values differ much, each bar is wider than the one before by the same factor."""
    values = np.asarray(values, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    whole = bool(np.all(values == np.round(values)))
    if whole and high - low < most:
        edges = np.arange(low, high + 2)
    elif low > 0 and high / low > most:
        edges = np.geomspace(low, high * (1 + 1e-9), most + 1)
    else:
        edges = np.linspace(low, high, most + 1)
    if whole:
        edges = np.unique(np.ceil(edges))
    if low == high:
        edges = np.array([low, low + 1])
    edges[-1] = max(edges[-1], high)
    counts, edges = np.histogram(values, edges)
    return Histogram(title, edges.tolist(), counts.tolist(), float(np.median(values)), float(values.mean()), high)


def histograms(findings: Findings, most: int = 20) -> list[Histogram]:
    """What there is to draw, in `most` bars at most."""
    table = findings.table
    good = table.rows[table.rows["good"]]
    values: dict[str, Numbers] = {}
    if len(good):
        values["messages per row"] = good["turns"]
        values["images per row"] = good["images"]
        values["characters per row"] = good["characters"]
    if len(good) and findings.model is not None:
        values["tokens per row"] = table.rows["tokens"][table.rows["tokens"] > 0]
        values["supervised tokens per row"] = good["supervised"]
    images = table.headers[table.headers["good"]]
    if len(images):
        values["pixels of the shorter edge"] = np.minimum(images["height"], images["width"])
        values["width / height"] = images["width"] / images["height"]
    return [histogram(title, numbers, most) for title, numbers in values.items()]


def lengths(findings: Findings) -> Lengths | None:
    """None without a model."""
    if findings.model is None:
        return None
    rows = findings.table.rows
    fits, context = rows[rows["good"]], findings.context
    fill, bins = packing_fill(fits["kept"], fits["images"], context) if context is not None and len(fits) else (None, 0)
    too_long = int(np.sum(~rows["good"] & (rows["tokens"] > (context or 1 << 62))))
    return Lengths(
        context,
        int(fits["kept"].sum()),
        int(fits["supervised"].sum()),
        int(np.sum(fits["dropped"] > 0)),
        int(fits["dropped"].sum()),
        too_long,
        fill,
        bins,
    )


def packing_fill(tokens: Numbers, images: Numbers, context: int) -> tuple[float, int]:
    """Share of real tokens in packed rows of `context`, and how many those are, with the defaults of training."""
    from data.packing import Packing, pack

    order = np.random.default_rng(0).permutation(len(tokens))
    packing, packed = Packing("pack"), 0
    for start in range(0, len(order), packing.window):
        part = order[start : start + packing.window]
        packed += len(pack(tokens[part].tolist(), images[part].tolist(), context, packing.most_images(context)))
    return float(tokens.sum()) / (packed * context), packed


def longest(findings: Findings) -> list[tuple[str, int]]:
    """The longest rows and their tokens, or characters without a model."""
    table = findings.table
    values = table.rows["tokens" if findings.model is not None else "characters"]
    order = np.argsort(-values, kind="stable")[:LONGEST].tolist()
    return [(table.source.where(row), int(values[row])) for row in order if values[row]]


def said_share(table: Table) -> float:
    """The assistants' share of all characters."""
    good = table.rows[table.rows["good"]]
    return float(good["said"].sum()) / max(1, int(good["characters"].sum()))


def as_json(findings: Findings) -> dict[str, Any]:
    """All figures; the first three keys are for programs to rely on."""
    table, told = findings.table, lengths(findings)
    good = table.rows[table.rows["good"]]
    return {
        "rows": findings.num_rows,
        "good": findings.num_rows - len(table.bad),
        "bad_rows": [{"where": row.where, "reason": row.reason} for row in table.bad],
        "format": table.source.format,
        "reasons": {name: len(rows) for name, rows in kinds(table.bad).items()},
        "examples": {
            name: {"where": rows[0].where, "reason": rows[0].reason} for name, rows in kinds(table.bad).items()
        },
        "ignored": table.ignored,
        "messages": int(good["turns"].sum()),
        "text_only": int(np.sum(good["images"] == 0)),
        "images": {
            "shown": int(good["images"].sum()),
            "files": len(table.headers),
            "decoded": int(table.decoded.sum()),
            "bad": table.bad_images,
        },
        "said_share": said_share(table),
        "duplicates": {
            **findings.counts,
            "rows": findings.same_rows,
            "ids": findings.same_ids,
            "images": [[image.name for image in group] for group in findings.same_images],
        },
        "against": [
            {
                "path": other.path,
                "rows": other.rows,
                "bad": other.bad,
                "same_rows": other.same_rows,
                "alike": other.alike,
                "row_pairs": other.row_pairs,
                "image_pairs": [
                    {"ours": pair.ours.name, "where": pair.ours.where, "theirs": pair.theirs.name, "bits": pair.bits}
                    for pair in other.image_pairs
                ],
            }
            for other in findings.compared
        ],
        "model": None if told is None else {"model": findings.model, **vars(told)},
        "longest": longest(findings),
        "histograms": [vars(bars) for bars in histograms(findings)],
    }
