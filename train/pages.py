"""A run's page for people: curves, figures, some questions and answers. One HTML file, nothing to download."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from data.benchmarks import Item
from data.pictures import ImageRef, load_image
from train.runs import Run, replace_text

THUMBNAIL = 160  # pixels
_templates = jinja2.Environment(loader=jinja2.PackageLoader("train"), autoescape=True, undefined=jinja2.StrictUndefined)


@dataclass(frozen=True)
class Sample:
    """A question with its picture (a data URL), the answer given and the truth."""

    question: str
    answer: str
    truth: str
    right: bool
    kind: str | None
    picture: str | None


@dataclass(frozen=True)
class Curve:
    title: str
    svg: str


def make_sample(item: Item, answer: str, score: float) -> Sample:
    picture = _data_url(item.image) if item.image is not None else None
    return Sample(item.question, answer, " / ".join(dict.fromkeys(item.references)), score > 0, _kind(item), picture)


def _kind(item: Item) -> str | None:
    return item.groups[0].partition("/")[2] if item.groups else None


def write_run_page(
    run: Run,
    path: Path,
    figures: Mapping[str, Any] | None = None,
    samples: Sequence[Sample] = (),
    title: str = "",
) -> None:
    """report.html of a run: curves of every stage, and what is known beyond them."""
    page = _templates.get_template("run.html").render(
        title=title or f"Run {run.folder.name}",
        figures=dict(figures or {}),
        curves=stage_curves(run.metrics()),
        samples=samples,
        recipe=run.recipe_file.read_text(encoding="utf-8"),
    )
    replace_text(path, page)


def stage_curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Loss and learning rates of each stage over its steps."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for entry in metrics:
        stages.setdefault(entry["stage"], []).append(entry)
    return [Curve(f"Stage {name}", _draw(entries)) for name, entries in stages.items()]


def _draw(entries: Sequence[Mapping[str, Any]]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    losses, rates = figure.subplots(1, 2)
    steps = [entry["step"] for entry in entries]
    values = [math.nan if entry.get("skipped") else entry["loss"] for entry in entries]
    losses.plot(steps, values, linewidth=0.8, alpha=0.4)
    losses.plot(steps, _smooth(values), linewidth=1.5)
    losses.set(title="loss", xlabel="step", ylim=(0, None))
    for part in entries[0]["lr"]:
        rates.plot(steps, [entry["lr"][part] for entry in entries], label=part, linewidth=1)
    rates.set(title="learning rates", xlabel="step")
    rates.legend(frameon=False, fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """The running mean; where nothing was learned (NaN) it stays as it was."""
    smoothed: list[float] = []
    mean = math.nan
    for value in values:
        mean = value if math.isnan(mean) else mean if math.isnan(value) else keep * mean + (1 - keep) * value
        smoothed.append(mean)
    return smoothed


def _data_url(ref: ImageRef) -> str:
    image = load_image(ref)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, format="PNG" if image.width <= 64 else "JPEG", quality=85)
    kind = "png" if image.width <= 64 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
