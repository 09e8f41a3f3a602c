"""The training loop: stages of a recipe, one optimizer step after another, stoppable and resumable anywhere."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers.utils import logging as transformers_logging

from data.loader import ImageCache, Loader, State, Step, read_state
from data.mixture import STREAM_EPOCH, Mixture
from data.streams import Stream
from train.build import open_sources
from train.check import check_processes, check_recipe, check_rows, tell_rows
from train.health import Health, is_finite
from train.monitor import Monitor
from train.objectives import Objective, build_objective
from train.parts import assert_only_these_learn, make_optimizer, manifest, split_into_parts
from train.quarantine import Quarantine
from train.recipe import Recipe, Stage
from train.runs import Run, resolved
from train.state import (
    Position,
    check_position,
    latest,
    random_state,
    read_position,
    restore,
    save_state,
    set_random_state,
)
from vlm.checkpoint import link_folder
from vlm.device import keep_freed_memory, pick_device, pick_dtype
from vlm.documents import packed_attention
from vlm.errors import DiskFullError, UserError, first_line
from vlm.threads import describe_threads


class Stopped(KeyboardInterrupt):
    """Somebody asked the run to stop; a checkpoint was written."""


def run_training(recipe: Recipe, folder: Path, resume: bool = False) -> Run:
    """Trains all stages of a recipe into `folder`; stages that are finished there are not repeated."""
    device = pick_device(recipe.device)
    run = Run(folder)
    held = run.held()
    recipe = resolved(recipe, held, torch.get_num_threads())
    _prepare_process(recipe, device)
    precision = "bf16" if pick_dtype(recipe.precision, device) is torch.bfloat16 else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    check_processes(recipe, accelerator.num_processes)
    if held is None:
        check_recipe(recipe)
    for stage in recipe.stages:
        tell_rows(check_rows(recipe, stage), accelerator.is_main_process)
    claimed = accelerator.is_main_process and run.claim(recipe, resume)
    accelerator.wait_for_everyone()
    if run.finished:
        return run
    try:
        run_stages(recipe, run, accelerator)
    except BaseException as error:
        if claimed:
            run.abandon()
        if isinstance(error, DiskFullError):
            raise DiskFullError(f"{error}; make room, and go on with --resume") from error
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise UserError(
                f"a worker that prepares rows has ended ({first_line(error)}); most often memory ran out: lower "
                "workers or image_cache_mb, and go on with --resume"
            ) from error
        raise
    return run


def run_stages(recipe: Recipe, run: Run, accelerator: Accelerator) -> None:
    """Whatever is left of a claimed run."""
    read = ImageCache((recipe.image_cache_mb << 20) // max(1, recipe.workers))
    checkpoint = latest(run.checkpoints)
    at = read_position(checkpoint) if checkpoint else None
    step = 0
    with Monitor(run, quiet=not accelerator.is_main_process) as monitor, _stop_signals() as stop:
        monitor.say(describe_threads())
        for index, stage in enumerate(recipe.stages):
            if not (run.stage(stage.name) / "config.json").is_file():
                set_seed(recipe.seed * 1000 + index)
                with accelerator.main_process_first():  # it writes the tokenizer that the others read
                    objective = build_objective(recipe, stage, run, read)
                here = checkpoint if at is not None and at.stage == index else None
                run_stage(recipe, stage, index, step, objective, run, accelerator, monitor, stop, here)
                if accelerator.is_main_process:
                    objective.save(run.stage(stage.name))
                accelerator.wait_for_everyone()
            step += run.steps_of(stage.name)
        if accelerator.is_main_process:
            link_folder(run.stage(recipe.stages[-1].name), run.model)


def run_stage(
    recipe: Recipe,
    stage: Stage,
    index: int,
    offset: int,
    objective: Objective,
    run: Run,
    accelerator: Accelerator,
    monitor: Monitor,
    stop: "StopRequest",
    checkpoint: Path | None,
) -> None:
    """One stage from its beginning, or from a checkpoint. offset: steps of the stages before."""
    parts = split_into_parts(objective.model, stage)
    optimizer = make_optimizer(parts, stage)
    assert_only_these_learn(objective.model, parts, optimizer)
    mixture = open_mixture(recipe, stage, index)
    data = [source.fingerprint() for source in mixture.sources]
    samples = max(1, round(stage.epochs * len(mixture))) if stage.epochs else None
    total = stage.steps or samples or 0
    world, rank = accelerator.num_processes, accelerator.process_index
    at = Position(index, 0, offset, [asdict(State())] * world, [], mixture.rows, data)
    objective.model.to(accelerator.device)
    if checkpoint is not None:
        at = read_position(checkpoint)
        check_position(checkpoint, at, world, mixture, data)
        restore(checkpoint, objective.model, optimizer)
        set_random_state(at.random[rank])
    if accelerator.is_main_process:
        run.forget_after(at.step)
    accelerator.wait_for_everyone()
    earlier = [entry for entry in run.metrics() if entry["stage"] == stage.name]
    health = Health(stage.name, objective.chance, earlier)
    quarantine = Quarantine(run, recipe, stage.name, mixture.reach(samples), quiet=not accelerator.is_main_process)
    packs = stage.packing.mode == "pack"
    apart = packed_attention(objective.language_model, accelerator.autocast) if packs else nullcontext()
    model, optimizer = accelerator.prepare(objective.model, optimizer)
    model.train()
    done, state, seen = at.done, read_state(at.loaders[rank]), sum(loader["seen"] for loader in at.loaders)
    monitor.begin(stage.name, total, seen if samples else done, manifest(parts))
    loader = Loader(
        mixture,
        objective,
        stage.batch_size,
        stage.micro_batch_size,
        stage.packing,
        objective.room,
        samples,
        recipe.workers,
        rank,
        world,
    )
    if accelerator.is_main_process:
        monitor.say(describe_length(stage, len(mixture), objective.room, loader.rows_together() if packs else 1.0))
    steps = loader.steps(state)
    with apart:
        while (done if samples is None else seen) < total:
            began = time.perf_counter()
            step = next(steps)
            counts = count_step(step, stop.wanted, accelerator)
            stopping = counts.pop("stopping") > 0  # of any rank: all stop after the same step
            before, seen = seen, counts.pop("seen")
            learns = counts["supervised"] > 0  # else all that was left were broken rows
            bad = gather_object(step.bad) if counts.pop("bad") else []
            quarantine.add(bad, offset + done + learns, seen, counts.pop("broken"))
            now, behind = (1, done) if samples is None else (seen - before, before)
            if learns:
                set_rates(optimizer, stage, behind, now, total)
                entry = optimizer_step(objective, model, optimizer, step, stage, accelerator, counts)
                done += 1
                entry = {"step": offset + done, "stage": stage.name, **entry}
                entry["seconds"] = time.perf_counter() - began
                entry["tokens_per_second"] = entry["tokens"] / entry["seconds"]
                monitor.log(entry, behind + now)
                health.add(entry)
            over = behind + now >= total
            # the end of the last stage is kept, too: a finished run may be made longer
            due = done % recipe.checkpoint_every == 0 if not over else index == len(recipe.stages) - 1
            if stopping or (due and learns) or (due and over and done):
                loaders, random = gather_object([asdict(step.state)]), gather_object([random_state()])
                if accelerator.is_main_process:
                    position = Position(index, done, offset + done, loaders, random, mixture.rows, data)
                    save_state(run.checkpoints, position, objective.model, optimizer, recipe.keep_checkpoints)
                accelerator.wait_for_everyone()
                if stopping:
                    raise Stopped(f"stopped after step {offset + done}; --resume goes on from there")
    if not done:
        raise UserError(f"{quarantine.summary()}; no row was left to learn from")
    health.check_alive()
    monitor.end(quarantine.summary(), health.summary())
    model.eval()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what is saved doesn't compute in bf16 any more
    accelerator.free_memory()


def count_step(step: Step[Any], stopping: bool, accelerator: Accelerator) -> dict[str, int]:
    """What a step holds, over all ranks, and how many of them are to stop."""
    names = ("supervised", "tokens", "room", "shortened", "bad", "seen", "broken", "stopping")
    own = [[b.supervised, b.tokens, b.room, len(b.shortened), 0, 0, 0, 0] for b in step.micro_batches]
    own.append([0, 0, 0, 0, len(step.bad), step.state.seen, step.state.broken, int(stopping)])
    counts = accelerator.reduce(torch.tensor(own, device=accelerator.device).sum(0), "sum")
    return dict(zip(names, counts.tolist(), strict=True))


def optimizer_step(
    objective: Objective,
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: Step[Any],
    stage: Stage,
    accelerator: Accelerator,
    counts: dict[str, int],
) -> dict[str, Any]:
    """One update by the loss per supervised token of the whole step: all micro-batches, all ranks, counted first.

    A step whose loss or gradient isn't finite is skipped: the weights stay, and what is logged names its rows.
    """
    micro_batches = step.micro_batches
    supervised, tokens = counts["supervised"], counts["tokens"]
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
            loss, shown = objective.loss(model, batch.to(accelerator.device))
            # ranks average their gradients, which the factor undoes
            accelerator.backward(loss * (accelerator.num_processes / supervised))
        for name, value in {"loss": loss.detach(), **shown}.items():
            sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value
    norm = float(accelerator.clip_grad_norm_(model.parameters(), stage.clip))
    means = {name: float(accelerator.reduce(value, "sum")) / supervised for name, value in sums.items()}
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    entry = {**means, "lr": rates, "gradient_norm": norm, "tokens": tokens, "supervised": supervised}
    entry["fill"] = tokens / counts["room"]
    if is_finite(entry):
        optimizer.step()
    else:
        entry |= {"skipped": True, "rows": gather_object(step.where)}
    optimizer.zero_grad(set_to_none=True)
    if counts["shortened"]:
        entry["shortened"] = gather_object([where for batch in micro_batches for where in batch.shortened])
    return entry


def set_rates(optimizer: torch.optim.Optimizer, stage: Stage, done: int, now: int, total: int) -> None:
    """Linear warm-up to each part's own rate, then a half cosine to zero (or constant): by what is done alone.

    done, now, total: steps before this one, 1, and all; or samples, where the stage is measured in epochs.
    """
    warmup = max(1, round(stage.warmup * total))
    if done < warmup:
        scale = min(1.0, (done + now) / warmup)
    elif stage.schedule == "constant":
        scale = 1.0
    else:
        scale = 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def describe_length(stage: Stage, rows: int, room: int, together: float | None) -> str:
    """How long a stage is. rows: of an epoch; together: how many share a packed row of up to `room` tokens."""
    told = f"{stage.name}: {rows:,} rows an epoch"
    if stage.packing.mode == "pack" and together:
        told += f", about {rows / together:,.0f} packed rows of up to {room:,} tokens"
    per_step = stage.batch_size * together if together else None
    what = "packed rows" if stage.packing.mode == "pack" else "rows"
    if stage.steps:
        epochs = f" = {'about ' * (together != 1)}{stage.steps * per_step / rows:.3g} epochs" if per_step else ""
        return f"{told}; {stage.steps:,} steps of {stage.batch_size} {what}{epochs}"
    assert stage.epochs is not None
    steps = (
        f" = about {math.ceil(stage.epochs * rows / per_step):,} steps of {stage.batch_size} {what}" if per_step else ""
    )
    return f"{told}; {stage.epochs:g} epochs{steps}"


def open_mixture(recipe: Recipe, stage: Stage, index: int) -> Mixture:
    """The rows of a stage in the order that it sees them."""
    sources = open_sources(recipe, stage)
    counts = [
        data.count(STREAM_EPOCH if isinstance(source, Stream) else len(source))
        for data, source in zip(stage.data, sources, strict=True)
    ]
    return Mixture(sources, recipe.seed * 1000 + index, counts, stage.shuffle, stage.group)


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one stops at once."""

    wanted = False

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


@contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    stop = StopRequest()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_process(recipe: Recipe, device: torch.device) -> None:
    """For bit-exact resume the thread count is part of the run, and on the CPU only repeatable kernels are used."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    torch.use_deterministic_algorithms(device.type == "cpu")
    # a debugging aid that costs a write of every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()
