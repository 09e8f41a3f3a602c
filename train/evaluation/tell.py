"""What `vlm eval` says, and how it works in several processes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.benchmarks import find_benchmark
from train.evaluation.journal import REPORT
from train.evaluation.outputs import Evaluation
from train.evaluation.run import claimed, evaluate, merge
from train.evaluation.tasks import Means, Question, make_tasks
from vlm.errors import UserError

SHOWN = {"none": "shown", "blind": "withheld", "shuffled": "exchanged"}


def run_evaluation(question: Question, means: Means, out: Path, controls: bool) -> int:
    """In this process; or, started by accelerate or torchrun, a shard in each, which the first one then merges."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and means.shards == 1:
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=question.device == "cpu")
        means = replace(means, shard=state.process_index + 1, shards=state.num_processes)
        if question.device == "auto" and state.device.type == "cuda":
            torch.cuda.set_device(state.device)
        question = settled(question)
        if state.is_main_process:
            with claimed(make_tasks(question, out, controls, means.allow_partial), means):
                pass
        state.wait_for_everyone()
        evaluate(question, means, out, controls)
        state.wait_for_everyone()
        return tell(merge([out], out), out) if state.is_main_process else 0
    question = settled(question)
    print(f"prompt: {question.prompt or find_benchmark(question.task).prompt!r}, greedy decoding")
    found = evaluate(question, means, out, controls)
    if not found:
        print(f"part {means.shard} of {means.shards} is done; when all are: vlm eval merge FOLDER ... --out DIR")
        return 0
    return tell(found, out)


def settled(question: Question) -> Question:
    """With the device and the number format that "auto" is here: a run that goes on elsewhere needs the same."""
    if question.engine != "torch":
        return question
    from vlm.device import DTYPES, pick_device, pick_dtype

    device = pick_device(question.device)
    dtype = pick_dtype(question.precision, device)
    precision = next(name for name, one in DTYPES.items() if one == dtype)
    return replace(question, device=device.type if question.device == "auto" else question.device, precision=precision)


def told_images(evaluation: Evaluation) -> str:
    """What became of the questions' images, if there are any."""
    have, every = evaluation.pictured, len(evaluation.items)
    if not have:
        return "none, no question has one"
    return SHOWN[evaluation.control] + (f" ({have} of {every} questions have one)" if have < every else "")


def tell(evaluations: Sequence[Evaluation], out: Path) -> int:
    """Scores on stdout. UserError when every question failed."""
    first, *controls = evaluations
    if first.failed and len(first.failed) == len(first.replies):
        raise UserError(f"every question failed; the first: {first.failed[0].error}")
    for name, value in first.scores.metrics.items():
        low, high = first.intervals[name]
        beside = "".join(f"   {other.control} {other.scores.metrics[name]:.4f}" for other in controls)
        print(f"{name:32} {value:9.4f}   [{low:.4f}, {high:.4f}]{beside}")
    if first.unscored:
        print(f"{first.unscored} questions without references: answered, not scored")
    if first.failed:
        print(f"{len(first.failed)} questions failed and are scored as wrong; the first: {first.failed[0].error}")
    for name, why in first.scores.notes.get("skipped", {}).items():
        print(f"{name} is left out: {why}")
    print(f"n = {first.scores.n}, images: {told_images(first)}, {first.seconds:.1f} s; {out / REPORT}")
    return 0
