"""`vlm eval`: asks a model all questions of a benchmark, goes on where it was stopped, and scores what it said."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from data.benchmarks import Benchmark, Item
from data.benchmarks.predictions import listed
from data.progress import progress
from train.evaluation.journal import Journal, PictureDigests, differing, read_replies, read_settings
from train.evaluation.outputs import Evaluation, write_outputs
from train.evaluation.prompts import CONTROLS, Prompt, Reply
from train.evaluation.tasks import Means, Question, Task, make_tasks
from vlm.errors import UserError
from vlm.settings import parse

Batches = Sequence[Sequence[Prompt]]
HOPELESS = 100


class Answerer(Protocol):
    """Whatever answers prompts. keeps_batches: an answer may depend on its batch, so batches aren't split."""

    keeps_batches: bool

    def replies(self, batches: Batches) -> Iterator[list[Reply]]: ...


def evaluate(question: Question, means: Means, out: Path, controls: bool = False) -> list[Evaluation]:
    """Leaves an evaluation folder in `out`, with `controls` those of both controls in it, and goes on with what is
    there. Evaluations, the one that was asked for first; none of one shard of many."""
    tasks = make_tasks(question, out, controls, means.allow_partial)
    with claimed(tasks, means) as journals:
        answer(tasks, journals, means)
    if means.shards > 1:
        return []
    return conclude(tasks, [out])


@contextmanager
def claimed(tasks: Sequence[Task], means: Means) -> Iterator[list[Journal]]:
    """The tasks' folders, this process's alone; taken back when it fails before anything is answered."""
    journals = [Journal(task.folder, means.shard, means.shards) for task in tasks]
    claims = 0
    try:
        for journal, task in zip(journals, tasks, strict=True):
            journal.claim(task.settings)
            claims += 1
        yield journals
    except BaseException:
        for journal in reversed(journals[:claims]):
            journal.close()
            if means.shards == 1:
                journal.abandon()
        raise
    finally:
        for journal in journals:
            journal.close()


def answer(tasks: Sequence[Task], journals: Sequence[Journal], means: Means) -> None:
    """Asks what isn't answered yet, of this shard; the model is loaded when there is anything."""
    with ExitStack() as stack:
        answerer: Answerer | None = None
        for task, journal in zip(tasks, journals, strict=True):
            batches = task.batches(means)
            known = remembered(batches, task.folder, means.retry_failed)
            if all(prompt.id in known for batch in batches for prompt in batch):
                continue
            if answerer is None:
                answerer = stack.enter_context(opened(task, means))
            ask(task, batches, journal, known, answerer)


def remembered(batches: Batches, folder: Path, retry_failed: bool) -> dict[str, Reply]:
    """The replies to these that any process has left in the folder. UserError when they are about other pictures."""
    replies, digests = read_replies(folder), PictureDigests()
    known, changed = {}, []
    for prompt in (prompt for batch in batches for prompt in batch):
        reply = replies.get(prompt.id)
        if reply is not None and (reply.error is None or not retry_failed):
            known[prompt.id] = reply
            if reply.error is None and reply.pictures != digests(prompt):
                changed.append(prompt.id)
    if changed:
        raise UserError(
            f"{folder}: the pictures of {len(changed)} questions are others than those they were asked about "
            f"({listed(changed)}); use another --out"
        )
    return known


def ask(
    task: Task, batches: Sequence[list[Prompt]], journal: Journal, known: dict[str, Reply], answerer: Answerer
) -> None:
    """Asks what isn't `known` yet, and writes each reply down.

    UserError when the first HOPELESS questions have failed, all of them: then it isn't the questions' fault.
    """
    if answerer.keeps_batches:
        todo = [batch for batch in batches if any(prompt.id not in known for prompt in batch)]
        again = {prompt.id for batch in todo for prompt in batch}
        known = {name: reply for name, reply in known.items() if name not in again}
    else:
        todo = [[prompt for prompt in batch if prompt.id not in known] for batch in batches]
    prompts, digests = {prompt.id: prompt for batch in todo for prompt in batch}, PictureDigests()
    total = sum(map(len, batches))
    done = len(known)
    what = task.question.task + ("" if task.question.control == "none" else f" ({task.question.control})")
    running = Running(task.benchmark, task.items, task.question.mode)
    running.add(list(known.values()))
    journal.open(known.values())
    with progress(what, total) as tell:
        began = time.perf_counter()
        for some in answerer.replies([batch for batch in todo if batch]):
            now = time.perf_counter()
            seconds = round((now - began) / max(len(some), 1), 6)
            replies = [replace(reply, seconds=seconds, pictures=digests(prompts[reply.id])) for reply in some]
            began = now
            journal.append(replies)
            running.add(replies)
            done += len(replies)
            tell(done, running.shown())
            if done == running.failed >= HOPELESS:
                why = next(reply.error for reply in replies if reply.error is not None)
                raise UserError(f"the first {done} questions have all failed ({why}); --retry-failed asks them again")


class Running:
    """The score of what is answered so far, where it is a mean over items."""

    def __init__(self, benchmark: Benchmark, items: Sequence[Item], mode: str) -> None:
        self.benchmark, self.mode = benchmark, mode
        self.items = {item.id: item for item in items if item.references}
        self.measure: Any = None
        self.sums: Any = 0
        self.failed = 0

    def add(self, replies: Sequence[Reply]) -> None:
        self.failed += sum(reply.error is not None for reply in replies)
        items = [self.items[reply.id] for reply in replies if reply.id in self.items]
        if items and self.benchmark.running:
            scores = self.benchmark.score_said(items, {reply.id: reply.answer for reply in replies}, self.mode)
            self.measure = scores.measures[self.benchmark.running]
            self.sums = self.sums + self.measure.statistics.sum(0)

    def shown(self) -> str:
        score = f"{self.benchmark.running} {self.measure.value(self.sums):.4g}" if self.measure is not None else ""
        return f"{score}{f', {self.failed} failed' if self.failed else ''}"


@contextmanager
def opened(task: Task, means: Means) -> Iterator[Answerer]:
    """The model, in this process or behind a URL; what was started for it is ended."""
    question, max_tokens = task.question, int(task.settings["max_tokens"])
    if question.engine == "torch":
        from train.evaluation.local import LocalModel
        from vlm.checkpoint import load
        from vlm.device import pick_device, pick_dtype

        where = pick_device(question.device)
        model, processor = load(question.model, where, pick_dtype(question.precision, where))
        yield LocalModel(model, processor, max_tokens, question.rank)
        return
    from train.evaluation.remote import RemoteModel, default_key, launched_vllm

    if question.engine == "vllm":
        log = task.folder / "vllm.log"
        with launched_vllm(question.model, means.vllm_python, question.precision, question.vllm_args, log) as url:
            # vLLM takes what generation_config.json says for a request's default
            yield RemoteModel(url, None, max_tokens, means.concurrency, extra={"repetition_penalty": 1.0})
    else:
        key = default_key(means.api_key)
        yield RemoteModel(question.engine, question.model, max_tokens, means.concurrency, key)


def conclude(tasks: Sequence[Task], sources: Sequence[Path]) -> list[Evaluation]:
    """Scores everything and writes what people read. sources: folders whose replies are all of the first task's; its
    controls' are in folders of their names in these."""
    evaluations = []
    for task in tasks:
        replies = gather(task, sources if task is tasks[0] else [source / task.question.control for source in sources])
        images = {prompt.id: prompt.turns[-1].image for prompt in task.prompts}
        evaluations.append(Evaluation(task.benchmark, task.items, replies, task.settings, images))
    for task, evaluation in zip(tasks, evaluations, strict=True):
        write_outputs(evaluation, task.folder, evaluations[1:] if task is tasks[0] else [])
    return evaluations


def gather(task: Task, sources: Sequence[Path]) -> dict[str, Reply]:
    """The replies of all shards, in the order of the questions. UserError when some are missing."""
    found = read_replies(*sources)
    if missing := [prompt.id for prompt in task.prompts if prompt.id not in found]:
        raise UserError(
            f"{', '.join(map(str, sources))}: {len(missing)} of {len(task.prompts)} questions have no answer yet "
            f"({listed(missing)}); run the shards that are missing"
        )
    return {prompt.id: found[prompt.id] for prompt in task.prompts}


def merge(sources: Sequence[Path], out: Path, **places: Any) -> list[Evaluation]:
    """One evaluation folder of those that shards have left, on whatever machines.

    places: settings that are others here, of those that change no answer: where files lie, the mode of the score.
    """
    held = {source: read_settings(source) for source in sources}
    first = held[sources[0]]
    for source, settings in held.items():
        if not first or not settings or not {"questions_sha256", "model_sha256"} <= settings.keys():
            raise UserError(f"{source if first else sources[0]}: no evaluation folder")
        if name := differing(first, settings):
            raise UserError(f"{source} and {sources[0]}: evaluations with another {name.replace('_', ' ')}")
    assert first
    with_controls = {source: all((source / name).is_dir() for name in CONTROLS[1:]) for source in sources}
    if len(set(with_controls.values())) > 1:
        without = [str(source) for source, there in with_controls.items() if not there]
        raise UserError(f"{', '.join(without)}: no controls there, which the other parts have")
    asked = {name: first[name] for name in Question.__dataclass_fields__ if name in first}
    question = replace(parse(Question, asked, str(sources[0])), **places)
    # of the model that gave the answers, whatever lies in its folder now
    tasks = make_tasks(question, out, with_controls[sources[0]], True, first["model_sha256"])
    if first["questions_sha256"] != tasks[0].settings["questions_sha256"]:
        raise UserError(f"{question.data}: the questions are others than those of {sources[0]}")
    with claimed(tasks, Means()) as journals:
        evaluations = conclude(tasks, list(sources))
        if out not in sources:  # without answers of its own it would be free for other settings
            for journal, evaluation in zip(journals, evaluations, strict=True):
                journal.open(evaluation.replies.values())
    return evaluations
