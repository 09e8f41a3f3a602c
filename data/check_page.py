"""The page of `vlm data check`: one HTML file, nothing to download."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2

from data.bad import kinds
from data.check import Alike, Findings, Shown
from data.check_figures import Histogram, histograms, longest
from data.check_report import figures, listed_keys, number, warnings
from data.pictures import load_image
from data.sources import Source
from vlm.errors import UserError

MOST_ROWS = 200  # of each kind
MOST_PICTURES = 40
THUMBNAIL = 160
WIDTH, HEIGHT, MARGIN, WIDEST = 420, 150, 34, 60
_pages = jinja2.Environment(
    loader=jinja2.PackageLoader("data", "pages"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(findings: Findings, path: Path) -> None:
    """Written aside and renamed, so that a page that is there is whole."""
    sources = [findings.table.source, *findings.others]
    keys = findings.table.ignored
    ignored = [("ignored columns", listed_keys(keys, len(keys)))] if keys else []
    page = _pages.get_template("check.html").render(
        title=f"Check of {findings.table.source.path.name}",
        path=findings.table.source.path,
        format=findings.table.source.format,
        rows=findings.num_rows,
        num_bad=len(findings.table.bad),
        share=findings.bad_share,
        figures=[*figures(findings), *ignored],
        warnings=warnings(findings),
        kinds=[(name, len(bad), bad[:MOST_ROWS]) for name, bad in kinds(findings.table.bad).items()],
        bars=[(bars, draw(bars)) for bars in histograms(findings)],
        longest=longest(findings),
        unit="tokens" if findings.model is not None else "characters",
        same_rows=findings.same_rows[:MOST_ROWS],
        same_ids=findings.same_ids[:MOST_ROWS],
        same_images=_groups(findings.same_images, sources),
        compared=[(other, _pairs(other.image_pairs, sources)) for other in findings.compared],
        counts=findings.counts,
        most_rows=MOST_ROWS,
    )
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None
    finally:
        aside.unlink(missing_ok=True)


def draw(bars: Histogram) -> str:
    """SVG of a histogram: a bar for each count, the edges below."""
    highest, width = max(bars.counts), min(WIDEST, WIDTH / len(bars.counts))
    drawn = []
    for place, count in enumerate(bars.counts):
        height = (HEIGHT - MARGIN) * count / highest
        tip = f"{number(bars.edges[place])} to {number(bars.edges[place + 1])}: {count:,}"
        drawn.append(
            f'<rect x="{place * width + 0.5:.1f}" y="{HEIGHT - MARGIN - height:.1f}" width="{max(1, width - 1):.1f}" '
            f'height="{height:.1f}"><title>{tip}</title></rect>'
        )
    apart = max(1, round(len(bars.counts) / 5))
    for place in range(0, len(bars.counts), apart):
        drawn.append(f'<text x="{place * width + 1:.1f}" y="{HEIGHT - MARGIN + 16}">{number(bars.edges[place])}</text>')
    said = f"median {number(bars.median)} · mean {number(bars.mean)} · most {number(bars.largest)}"
    drawn.append(f'<text class="said" x="1" y="{HEIGHT - 2}">{said}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _groups(groups: Sequence[list[Shown]], sources: Sequence[Source]) -> list[tuple[str, list[Shown]]]:
    return [(_picture(group[0], sources), group) for group in groups[:MOST_PICTURES]]


def _pairs(pairs: Sequence[Alike], sources: Sequence[Source]) -> list[tuple[str, str, Alike]]:
    return [(_picture(pair.ours, sources), _picture(pair.theirs, sources), pair) for pair in pairs[:MOST_PICTURES]]


def _picture(shown: Shown, sources: Sequence[Source]) -> str:
    """A small copy as a data URL; nothing where the image can't be read."""
    try:
        image = load_image(sources[shown.source][shown.row].images[shown.place])
    except (UserError, OSError):
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
