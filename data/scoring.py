"""`vlm score`: scores of a file of predictions, their intervals, and how two files of predictions differ."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.benchmarks import Benchmark, Scores, find_benchmark
from data.benchmarks.captions import Captions
from data.benchmarks.scores import changed, differences
from vlm.errors import UserError

MOST_DRAWS = 100_000
SHOWN = 10  # of the items that changed, on a terminal
DIFFERENT = 0.1  # points of accuracy, from which on another rule's score is told


def run_scoring(options: argparse.Namespace) -> int:
    benchmark = find_benchmark(options.task, options.columns)
    if options.tokenizer is not None:
        if not isinstance(benchmark, Captions):
            raise UserError(f"--tokenizer is for captions; {options.task} has its own rules")
        benchmark.tokenizer = options.tokenizer
    if options.clip is not None:
        if not isinstance(benchmark, Captions):
            raise UserError(f"--clip is for captions; {options.task} has its own rules")
        benchmark.clip, benchmark.images = options.clip, options.images
    elif options.images is not None:
        raise UserError("--images is for --clip, which compares captions with them")
    if options.bootstrap > MOST_DRAWS:
        raise UserError(
            f"--bootstrap {options.bootstrap}: {MOST_DRAWS:,} draws are the most, and a thousand are enough"
        )
    benchmark.check_mode(options.mode)
    if options.against is None:
        scores = benchmark.score_files(options.predictions, options.references, options.mode, options.allow_partial)
        other = None
    else:
        scores, other = score_both(
            benchmark,
            options.predictions,
            options.against,
            options.references,
            options.mode,
            options.allow_partial,
        )
    for name, why in scores.notes.get("skipped", {}).items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    if options.json:
        told = scores.as_json(options.per_item, options.bootstrap, options.seed)
        if other is not None:
            told["against"] = comparison(scores, other, options)
        print(json.dumps(told))
        return 0
    tell(scores, options.bootstrap, options.seed)
    if other is not None:
        tell_difference(comparison(scores, other, options))
    return 0


def score_both(
    benchmark: Benchmark, ours: Path, theirs: Path, references: Path, mode: str, allow_partial: bool
) -> tuple[Scores, Scores]:
    """Scores of two files of predictions over the questions that both answer."""
    mine = benchmark.matched(ours, references, allow_partial)
    others = benchmark.matched(theirs, references, allow_partial)
    both = [item for item in mine.items if item.id in others.answers]
    if not both:
        raise UserError(f"{ours} and {theirs}: no question that both answer")
    scores = benchmark.score_given(replace(mine, items=both), mode)
    other = benchmark.score_given(replace(others, items=both), mode)
    if "left_out" in other.notes:
        scores.notes["left_out_of_other"] = other.notes["left_out"]
    return scores, other


def comparison(ours: Scores, theirs: Scores, options: argparse.Namespace) -> dict[str, Any]:
    found = differences(ours, theirs, options.bootstrap or 1, options.seed)
    return {
        "predictions": str(options.against),
        "metrics": {
            name: {"ours": one.ours, "theirs": one.theirs, "difference": one.value}
            | ({"interval": one.interval} if options.bootstrap else {})
            for name, one in found.items()
        },
        "changed": changed(ours.per_item, theirs.per_item),
    }


def tell(scores: Scores, samples: int, seed: int = 0) -> None:
    """Metrics with their intervals, and whatever must be known beside them."""
    print(f"{scores.task}, mode {scores.mode}, n = {scores.n}")
    if scores.scored:
        print(f"scored: {scores.scored}")
    intervals = scores.intervals(samples, seed) if samples else {}
    for name, value in scores.metrics.items():
        interval = f"   [{intervals[name][0]:.4f}, {intervals[name][1]:.4f}]" if samples else ""
        print(f"  {name:32} {value:9.4f}{interval}")
    if (other := scores.other) and abs(other.metrics["accuracy"] - scores.metrics["accuracy"]) > DIFFERENT:
        print(f"otherwise: accuracy {other.metrics['accuracy']:.4f} of {other.scored}")
    for name, note in scores.notes.items():
        if name == "skipped":
            continue
        if isinstance(note, list):
            print(f"{name}: {json.dumps(note[:SHOWN], ensure_ascii=False)}{' ...' if len(note) > SHOWN else ''}")
        else:
            print(f"{name}: {json.dumps(note, ensure_ascii=False)}")
    if samples:
        print(f"in brackets: 95 % intervals, {samples} draws of the items with replacement (seed {seed})")


def tell_difference(told: dict[str, Any]) -> None:
    print(f"against {told['predictions']}: ours, theirs, difference, its interval (items drawn in pairs)")
    for name, one in told["metrics"].items():
        interval = "   [{:+.4f}, {:+.4f}]".format(*one["interval"]) if "interval" in one else ""
        print(f"  {name:32} {one['ours']:9.4f} {one['theirs']:9.4f} {one['difference']:+9.4f}{interval}")
    items = told["changed"]
    better = sum(ours > theirs for ours, theirs in items.values())
    print(f"items that changed: {len(items)}, {better} better, {len(items) - better} worse")
    for name, (ours, theirs) in list(items.items())[:SHOWN]:
        print(f"  {name}: {ours:.4g}, against {theirs:.4g}")
    if len(items) > SHOWN:
        print("  ... (all with --json)")
