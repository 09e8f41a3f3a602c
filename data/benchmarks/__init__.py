"""Benchmarks: what is asked, in which words, and how the answers are scored."""

from data.benchmarks.base import Benchmark, Item, Scores
from data.benchmarks.exact import Exact
from data.benchmarks.vqa import VQA
from vlm.errors import UserError

BENCHMARKS: dict[str, type[Benchmark]] = {"exact": Exact, "vqav2": VQA}

__all__ = ["BENCHMARKS", "Benchmark", "Item", "Scores", "find_benchmark"]


def find_benchmark(task: str) -> Benchmark:
    if task not in BENCHMARKS:
        raise UserError(f"unknown task {task!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[task]()
