"""Command-line entries of data: arguments here, work in the modules they name."""

import argparse
from pathlib import Path


def data(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples:\n  vlm data scenes --out runs/scenes --train 2000\n"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    scenes = actions.add_parser("scenes", help="draw the synthetic scenes of the demo: PNG and JSONL, like anybody's data")
    scenes.add_argument("--out", type=Path, required=True)
    scenes.add_argument("--train", type=int, default=20000, help="training scenes (default 20000)")
    scenes.add_argument("--heldout", type=int, default=1000, help="held-out questions (default 1000)")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=_scenes)


def _scenes(options: argparse.Namespace) -> int:
    from data.scenes.write import write_scenes

    write_scenes(options.out, train=options.train, heldout=options.heldout, seed=options.seed)
    print(f"done: {options.out}")
    return 0
