"""Types of command-line arguments."""

import argparse
from collections.abc import Iterable


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def share(text: str) -> float:
    """A part of a whole: 0.005 or 0.5%."""
    value = fraction(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1 (or 0% and 100%), got {text}")
    return value


def fraction(text: str) -> float:
    """0.005 or 0.5% as a number; ValueError for anything else."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def add_columns(parser: argparse.ArgumentParser, of: str = "") -> None:
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=KEY",
        help=f"keys of rows by other names: image=picture question=q answer=a; image=left+right; ignore=KEY{of}",
    )


def completed(argument: argparse.Action, names: Iterable[str]) -> None:
    """The shell completes it to one of `names`; what else is said is judged by whoever uses it."""
    vars(argument)["completer"] = lambda **_: list(names)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
