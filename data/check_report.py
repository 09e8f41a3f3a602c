"""What `vlm data check` prints: short tables, the worst first."""

from typing import Any

from rich.markup import escape

from data.bad import Bad, kinds
from data.check import Findings
from data.check_figures import Histogram, histograms, lengths, longest, said_share

MOST_KINDS, MOST_ROWS, MOST_LONGEST, MOST_KEYS = 12, 3, 5, 20
BAR, MOST_BARS = 24, 10


def print_report(findings: Findings, console: Any) -> None:
    from rich.table import Table

    table = findings.table
    source = table.source
    good = findings.num_rows - len(table.bad)
    verdict = "all sound" if not table.bad else f"[bold red]{len(table.bad):,} broken[/] ({findings.bad_share:.2%})"
    console.print(f"[bold]{escape(str(source.path))}[/]: {source.format}, {findings.num_rows:,} rows, {verdict}")
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(justify="right")
    rows.add_column(overflow="fold")
    for name, said in figures(findings):
        rows.add_row(name, escape(said))
    console.print(rows)
    if table.ignored:
        console.print(f"ignored columns: {escape(listed_keys(table.ignored))}")
    if table.bad:
        broken = Table("rows", "what is wrong", "for example", box=None, pad_edge=False, header_style="bold red")
        found = list(kinds(table.bad).items())
        for name, bad in found[:MOST_KINDS]:
            examples = "\n".join([*example(name, bad[0]), *(escape(row.where) for row in bad[1:MOST_ROWS])])
            more = f"\n… {len(bad) - MOST_ROWS:,} more" if len(bad) > MOST_ROWS else ""
            broken.add_row(f"{len(bad):,}", escape(name), examples + more)
        console.print()
        console.print(broken)
        if len(found) > MOST_KINDS:
            console.print(f"and {len(found) - MOST_KINDS} more kinds")
    for bars in histograms(findings, MOST_BARS):
        console.print()
        _print_bars(bars, console)
    if good:
        console.print(f"\n[bold]longest rows[/] ({'tokens' if findings.model else 'characters'})")
        for where, length in longest(findings)[:MOST_LONGEST]:
            console.print(f"{length:>12,}  {escape(where)}")
    for line in warnings(findings):
        console.print(f"[yellow]warning[/] {escape(line)}")


def example(name: str, row: Bad) -> list[str]:
    """Where a row of this kind is, with its own reason where the kind's name lacks names and numbers of it."""
    return [escape(row.where)] if row.reason == name else [f"{escape(row.where)}: {escape(row.reason)}"]


def listed_keys(ignored: dict[str, int], most: int = MOST_KEYS) -> str:
    """Keys with how many rows have them, the most frequent first."""
    told = ", ".join(f"{key} ({count:,})" for key, count in [*ignored.items()][:most])
    return told + (f" and {len(ignored) - most} more" if len(ignored) > most else "")


def figures(findings: Findings) -> list[tuple[str, str]]:
    """Names and values of what is known, in the order to be read."""
    table, told = findings.table, lengths(findings)
    good = table.rows[table.rows["good"]]
    shown, text_only = int(good["images"].sum()), int((good["images"] == 0).sum())
    found = [("rows", f"{len(good):,} good of {findings.num_rows:,}; {text_only:,} without an image")]
    decoded = f"{int(table.decoded.sum()):,} decoded"
    bad = f", {table.bad_images:,} broken" if table.bad_images else ""
    if len(table.headers):
        found.append(("images", f"{shown:,} shown, {len(table.headers):,} different, all headers read, {decoded}{bad}"))
    if told is None:
        found.append(("answers", f"{said_share(table):.0%} of all characters"))
        return found
    context = "no limit" if told.context is None else f"{told.context:,} tokens"
    assumed = f", {findings.image_tokens} tokens for an image" if findings.image_tokens is not None else ""
    found.append(("model", f"{findings.model}; context: {context}{assumed}"))
    share = told.supervised / max(1, told.tokens)
    found.append(("tokens", f"{told.tokens:,}, {told.supervised:,} of them ({share:.1%}) supervised"))
    if told.context is not None:
        shortened = f"{told.shortened:,} rows lose {told.dropped_messages:,} messages at their ends"
        found.append(("too long", f"{shortened}, {told.too_long:,} don't fit at all"))
    if told.fill is not None:
        found.append(("packed", f"into {told.packed_into:,} rows of {told.context:,} tokens, {told.fill:.1%} full"))
    return found


def warnings(findings: Findings) -> list[str]:
    """What isn't wrong with any row by itself."""
    found = []
    counts = findings.counts
    examples: dict[str, list[str]] = {
        "same_rows": next(iter(findings.same_rows), []),
        "same_ids": next(iter(findings.same_ids), []),
        "same_images": [image.name for image in next(iter(findings.same_images), [])],
    }
    said = {
        "same_rows": "rows that repeat an earlier one word for word",
        "same_ids": "rows with the id of an earlier one",
        "same_images": "image files with the bytes of another",
    }
    for name, words in said.items():
        if counts.get(name):
            found.append(f"{words}: {counts[name]:,} ({' = '.join(examples[name][:2])})")
    for other in findings.compared:
        if other.bad:
            found.append(f"broken rows in {other.path}: {other.bad:,} of {other.rows:,}")
        if other.same_rows:
            ours, theirs = other.row_pairs[0]
            found.append(f"rows that are in {other.path}, too: {other.same_rows:,} ({ours} = {theirs})")
        if other.alike:
            pair = other.image_pairs[0]
            found.append(
                f"images of {other.path} that look like some of the source: {other.alike:,} "
                f"({pair.ours.name} in {pair.ours.where}, {pair.theirs.name} in {pair.theirs.where})"
            )
    return found


def _print_bars(bars: Histogram, console: Any) -> None:
    console.print(
        f"[bold]{bars.title}[/]: median {number(bars.median)}, mean {number(bars.mean)}, most {number(bars.largest)}"
    )
    if len(bars.counts) < 2:
        return
    highest = max(bars.counts)
    for start, count in zip(bars.edges, bars.counts, strict=False):
        if count:
            length = max(1, round(BAR * count / highest))
            console.print(f"{number(start):>12} {'█' * length:<{BAR}} {count:,}", highlight=False)


def number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:,.2f}"
