"""Losses of runs beside each other, drawn from their metrics.jsonl.

python tests/benchmarks/draw_curves.py docs/curves.svg --panel "demo, early" learn "seed 0=runs/demo/runs/early"
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

POINTS = 80


def smoothed(run: Path, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of a stage, each point the mean of an equal share of its steps."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = np.array([row["loss"] for row in rows if row["stage"] == stage and not row.get("skipped")])
    share = max(1, len(losses) // POINTS)
    points = len(losses) // share
    return (np.arange(points) + 0.5) * share, losses[: points * share].reshape(points, share).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--panel", nargs="+", action="append", required=True, metavar="TITLE STAGE LABEL=RUN")
    options = parser.parse_args()
    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vlm", "font.size": 8})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(options.panel), figsize=(3 * len(options.panel), 2.8), layout="constrained")
    for axis, (title, stage, *runs) in zip(np.atleast_1d(axes), options.panel, strict=True):
        colours: dict[str, str] = {}
        for label, _, run in (each.partition("=") for each in runs):  # a label that comes again keeps its colour
            known = label in colours
            colour = colours.setdefault(label, f"C{len(colours)}")
            axis.plot(*smoothed(Path(run), stage), color=colour, linewidth=0.8, label=None if known else label)
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
