"""Command-line entries of data: arguments here, work in the modules they name."""

import argparse
from pathlib import Path


def data(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples:\n  vlm data scenes --out runs/scenes --train 2000\n"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    scenes = actions.add_parser(
        "scenes", help="draw the synthetic scenes of the demo: PNG and JSONL, like anybody's data"
    )
    scenes.add_argument("--out", type=Path, required=True)
    scenes.add_argument("--train", type=int, default=20000, help="training scenes (default 20000)")
    scenes.add_argument("--heldout", type=int, default=1000, help="held-out questions (default 1000)")
    scenes.add_argument("--lessons", type=int, default=5600, help="scenes of lessons.jsonl (default 5600)")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=_scenes)


def _scenes(options: argparse.Namespace) -> int:
    from data.scenes.write import write_scenes

    write_scenes(options.out, train=options.train, heldout=options.heldout, lessons=options.lessons, seed=options.seed)
    print(f"done: {options.out}")
    return 0


def score(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm score vqav2 predictions.json v2_mscoco_val2014_annotations.json\n"
        "  vlm score exact predictions.jsonl questions.jsonl --mode normalised --json --per-item"
    )
    parser.add_argument("task", metavar="TASK", help="vqav2 or exact")
    parser.add_argument("predictions", type=Path)
    parser.add_argument("references", type=Path)
    parser.add_argument("--mode", choices=("official", "normalised"), default="official", help="default: official")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON, and nothing else")
    parser.add_argument("--per-item", action="store_true", help="with --json: the score of every question, too")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    import json

    from data.benchmarks import find_benchmark

    scores = find_benchmark(options.task).score_files(options.predictions, options.references, options.mode)
    if options.json:
        print(json.dumps(scores.as_json(options.per_item)))
        return 0
    print(f"{scores.task}, mode {scores.mode}, n = {scores.n}")
    for name, value in scores.metrics.items():
        print(f"  {name:32} {value:8.4f}")
    return 0
