"""Benchmarks: what is asked, in which words, and how the answers are scored."""

from collections.abc import Iterable
from importlib import import_module

from data.benchmarks.base import Answers, Benchmark, Item
from data.benchmarks.scores import Scores
from vlm.errors import UserError

# module:class, imported when it's asked for
BENCHMARKS = {
    "vqav2": "vqa:VQA",
    "textvqa": "textvqa:TextVQA",
    "vizwiz": "vizwiz:VizWiz",
    "coco-caption": "captions:Captions",
    "pope": "yes_no:POPE",
    "gqa": "gqa:GQA",
    "scienceqa": "choice:ScienceQA",
    "mmbench": "mmbench:MMBench",
    "exact": "exact:Exact",
}

__all__ = ["BENCHMARKS", "Answers", "Benchmark", "Item", "Scores", "find_benchmark"]


def find_benchmark(task: str, columns: Iterable[str] = ()) -> Benchmark:
    """columns: NAME=KEY, of rows that have keys of other names; UserError for a task with files of its own form."""
    if task not in BENCHMARKS:
        raise UserError(f"unknown task {task!r}; there are {', '.join(BENCHMARKS)}")
    module, _, name = BENCHMARKS[task].partition(":")
    found: Benchmark = getattr(import_module(f"data.benchmarks.{module}"), name)()
    if columns := tuple(columns):
        found.name_columns(columns)
    return found
