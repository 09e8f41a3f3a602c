"""The training loop: stages of a recipe, one optimizer step after another, stoppable and resumable anywhere."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers.utils import logging as transformers_logging

from data.loader import ImageCache, Loader, Order, Rows
from train.build import open_sources
from train.check import check_processes, check_recipe, check_rows
from train.monitor import Monitor
from train.objectives import Objective, Pair, build_objective
from train.parts import assert_only_these_learn, make_optimizer, manifest, split_into_parts
from train.recipe import Recipe, Stage
from train.runs import Run, resolved
from train.state import Position, latest, read_position, restore, save_state
from vlm.checkpoint import link_folder
from vlm.device import keep_freed_memory, pick_device, pick_dtype
from vlm.errors import UserError


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
        check_rows(recipe, stage)
    claimed = accelerator.is_main_process and run.claim(recipe, resume)
    accelerator.wait_for_everyone()
    if run.finished:
        return run
    try:
        run_stages(recipe, run, accelerator)
    except BaseException:
        if claimed:
            run.abandon()
        raise
    return run


def run_stages(recipe: Recipe, run: Run, accelerator: Accelerator) -> None:
    """Whatever is left of a claimed run."""
    read = ImageCache(recipe.image_cache_mb << 20)
    checkpoint = latest(run.checkpoints)
    at = read_position(checkpoint) if checkpoint else None
    step = 0
    with Monitor(run, quiet=not accelerator.is_main_process) as monitor, _stop_signals() as stop:
        for index, stage in enumerate(recipe.stages):
            if (run.stage(stage.name) / "config.json").is_file():
                step += stage.steps
                continue
            set_seed(recipe.seed * 1000 + index)
            with accelerator.main_process_first():  # it writes the tokenizer that the others read
                objective = build_objective(recipe, stage, run, read)
            here = checkpoint if at is not None and at.stage == index else None
            run_stage(recipe, stage, index, step, objective, run, accelerator, monitor, stop, here)
            step += stage.steps
            if accelerator.is_main_process:
                objective.save(run.stage(stage.name))
            accelerator.wait_for_everyone()
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
    done = 0
    objective.model.to(accelerator.device)
    if checkpoint is not None:
        done = read_position(checkpoint).done
        restore(checkpoint, objective.model, optimizer)
    run.forget_after(offset + done)
    model, optimizer = accelerator.prepare(objective.model, optimizer)
    model.train()
    monitor.begin(stage.name, stage.steps, done, manifest(parts))
    batches = make_loader(recipe, stage, index, objective, accelerator).batches(done)
    while done < stage.steps:
        began = time.perf_counter()
        micro_batches = next(batches)
        set_rates(optimizer, stage, done)
        entry = optimizer_step(objective, model, optimizer, micro_batches, stage, accelerator)
        done += 1
        entry = {"step": offset + done, "stage": stage.name, **entry}
        entry["seconds"] = time.perf_counter() - began
        entry["tokens_per_second"] = entry["tokens"] / entry["seconds"]
        if not math.isfinite(entry["loss"]):
            raise UserError(f"{stage.name}: the loss is {entry['loss']} at step {done}; lower the learning rates")
        monitor.log(entry, done)
        if stop.wanted or (done % recipe.checkpoint_every == 0 and done < stage.steps):
            if accelerator.is_main_process:
                position = Position(index, done, offset + done)
                save_state(run.checkpoints, position, objective.model, optimizer, recipe.keep_checkpoints)
            accelerator.wait_for_everyone()
            if stop.wanted:
                raise Stopped(f"stopped after step {offset + done}; --resume goes on from there")
    monitor.end()
    model.eval()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what is saved doesn't compute in bf16 any more
    accelerator.free_memory()


def optimizer_step(
    objective: Objective,
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    stage: Stage,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """One update by the loss per supervised token of the whole step: all micro-batches, all ranks, counted first."""
    rows = [[batch.supervised, batch.tokens, len(batch.shortened)] for batch in micro_batches]
    counts = torch.tensor(rows, device=accelerator.device).sum(0)
    supervised, tokens, shortened = (int(count) for count in accelerator.reduce(counts, "sum"))
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
            loss, shown = objective.loss(model, batch.to(accelerator.device))
            # ranks average their gradients, which the factor undoes
            accelerator.backward(loss * (accelerator.num_processes / supervised))
        for name, value in {"loss": loss.detach(), **shown}.items():
            sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value
    norm = accelerator.clip_grad_norm_(model.parameters(), stage.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: float(accelerator.reduce(value, "sum")) / supervised for name, value in sums.items()}
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    entry = {**means, "lr": rates, "gradient_norm": float(norm), "tokens": tokens, "supervised": supervised}
    if shortened:
        entry["shortened"] = gather_object([where for batch in micro_batches for where in batch.shortened])
    return entry


def set_rates(optimizer: torch.optim.Optimizer, stage: Stage, done: int) -> None:
    """Linear warm-up to each part's own rate, then a half cosine to zero (or constant): by the step alone."""
    warmup = max(1, round(stage.warmup * stage.steps))
    if done < warmup:
        scale = (done + 1) / warmup
    elif stage.schedule == "constant":
        scale = 1.0
    else:
        scale = 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, stage.steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def make_loader(
    recipe: Recipe, stage: Stage, index: int, objective: Objective, accelerator: Accelerator
) -> Loader[list[Any]]:
    """Batches of this rank, each as a list of micro-batches."""
    rows = Rows(open_sources(recipe, stage), recipe.seed * 1000 + index)
    world, micro = accelerator.num_processes, stage.micro_batch_size or stage.batch_size
    micro = min(micro, stage.batch_size // world)

    def make(pairs: list[Pair]) -> list[Any]:
        return [objective.make(pairs[start : start + micro]) for start in range(0, len(pairs), micro)]

    order = Order(len(rows), rows.seed, stage.shuffle, stage.group)
    return Loader(rows, order, stage.batch_size, make, recipe.workers, accelerator.process_index, world)


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
