"""Requests per second of a deep and an early model, on vLLM and on the torch engine, and what limits them.

    python tests/benchmarks/serve_deep.py runs/deep/model runs/early/model --vllm-python ~/vllm/bin/python

Four servers stand side by side and are asked one at a time, in turn, the demo's held-out questions over HTTP by 1, 4,
16 and 64 clients; no picture comes twice to a server. Prints medians over the rounds as markdown, and of each server
the processor time by process, vLLM's own figures, and what the model alone would need. Flags behind -- are vLLM's (on a
GPU, --gpu-memory-utilization, since two of them share it).
"""

import argparse
import base64
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ask_demo import split
from load import Asked, Run, Server, ask, held_out, serving
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from serve.media import Limits, prepare_image
from serve.runner import ModelRunner, Prompt
from vlm import load as load_model
from vlm.device import pick_device, pick_dtype
from vlm.images import decode_image

LOADS = ("answers of one length", "answers of one length, no image", "real answers")
REAL_TOKENS = 16


@dataclass
class Figures:
    """Of one server under one load: a number for each round."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=dict)  # seconds per request
    own: dict[str, list[float]] = field(default_factory=dict)  # vLLM's
    tokens: list[float] = field(default_factory=list)  # new ones per request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deep", type=Path)
    parser.add_argument("early", type=Path)
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM (default: this)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, where all are of one length")
    parser.add_argument("--dtype", default="fp32", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--max-batch", type=int, default=64, help="answers made at once, by either engine")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out scenes")
    options, flags = split(parser, sys.argv[1:])
    print(f"load of the machine before: {os.getloadavg()[0]:.2f} of {os.cpu_count()} cores", flush=True)
    models = {"deep": options.deep, "early": options.early}
    shared = ["--dtype", options.dtype, "--max-batch", str(options.max_batch)]
    of_engine = {"vLLM": ["--vllm-python", options.vllm_python, *shared, "--", *flags], "torch": shared}
    found: dict[tuple[str, str, str, int], Figures] = {}
    with ExitStack() as stack:
        servers = {}
        for fusion, model in models.items():
            for engine, own in of_engine.items():
                server = stack.enter_context(serving(model, engine.lower(), *own))
                servers[fusion, engine] = server
                print(f"{fusion}, {engine}: ready after {server.ready_after:.0f} s", flush=True)
        drawn = 0
        for turn in range(-1, options.rounds):  # the first warms up
            for clients in options.clients:
                for load in LOADS:
                    count = 16 + 5 * clients if turn >= 0 else 2 * clients
                    asked = held_out(options.seed, drawn, drawn + count)
                    drawn += count
                    for (fusion, engine), server in servers.items():
                        eos = end_ids(models[fusion])
                        bodies = [body(each, load, engine, eos, options.tokens) for each in asked]
                        figures = found.setdefault((fusion, engine, load, clients), Figures())
                        measure(server, bodies, clients, figures if turn >= 0 else Figures())
            print(f"round {turn + 1} of {options.rounds}, load {os.getloadavg()[0]:.2f}", file=sys.stderr, flush=True)
    print_rates(found, options.clients, options.tokens)
    print_limits(found, options.clients)
    for fusion, model in models.items():
        print_floor(fusion, model, options)


def end_ids(model: Path) -> list[int]:
    from transformers import GenerationConfig

    ends = GenerationConfig.from_pretrained(model).eos_token_id
    return ends if isinstance(ends, list) else [ends]


def body(asked: Asked, load: str, engine: str, eos: Sequence[int], tokens: int) -> bytes:
    """A request; an answer of a fixed length is had in the way that costs the engine least."""
    if load == "real answers":
        return asked.body(max_tokens=REAL_TOKENS)
    endless: dict[str, Any] = {"ignore_eos": True} if engine == "vLLM" else {"logit_bias": {str(i): -100 for i in eos}}
    return asked.body(image="no image" not in load, max_tokens=tokens, **endless)


def measure(server: Server, bodies: Sequence[bytes], clients: int, figures: Figures) -> None:
    cpu, own, mine = server.cpu_seconds(), server.metrics(), time.process_time()
    run = ask(server.port, bodies, clients)
    mine, count = time.process_time() - mine, len(bodies)
    spent = {name: seconds - cpu.get(name, 0.0) for name, seconds in server.cpu_seconds().items()}
    for name, seconds in {**spent, "clients": mine}.items():
        figures.cpu.setdefault(name, []).append(seconds / count)
    after = server.metrics()
    for name, value in vllm_figures({key: after[key] - own.get(key, 0.0) for key in after}, run).items():
        figures.own.setdefault(name, []).append(value)
    figures.rates.append(run.rate)
    figures.latencies.append(statistics.median(run.latencies))
    figures.tokens.append(statistics.mean(answer["usage"]["completion_tokens"] for answer in run.answers))


def vllm_figures(grown: dict[str, float], run: Run) -> dict[str, float]:
    """What vLLM counted while these questions were asked; {} for a server that counts nothing."""
    steps = grown.get("vllm:iteration_tokens_total_count", 0.0)
    if not steps:
        return {}

    def mean(name: str) -> float:
        return 1000 * grown[f"vllm:{name}_seconds_sum"] / max(1.0, grown[f"vllm:{name}_seconds_count"])

    return {
        "ms/step": 1000 * run.seconds / steps,
        "tokens/step": grown["vllm:generation_tokens_total"] / steps,
        "queue ms": mean("request_queue_time"),
        "prefill ms": mean("request_prefill_time"),
        "ms between tokens": mean("inter_token_latency"),
    }


Found = dict[tuple[str, str, str, int], Figures]


def print_rates(found: Found, clients: Sequence[int], tokens: int) -> None:
    for load in LOADS:
        lengths = [statistics.mean(figures.tokens) for (_, _, name, _), figures in found.items() if name == load]
        if load != "real answers" and any(length != tokens for length in lengths):
            raise SystemExit(f"answers have {lengths} tokens where {tokens} were asked for")
        print(f"\n### Requests/s, {load} ({statistics.mean(lengths):.3g} tokens): median (lowest to highest)\n")
        table_head("", *(f"{count} client{'s' * (count > 1)}" for count in clients))
        middle = {key: statistics.median(figures.rates) for key, figures in found.items()}
        for fusion in ("deep", "early"):
            for engine in ("vLLM", "torch"):
                cells = []
                for count in clients:
                    rates = found[fusion, engine, load, count].rates
                    cells.append(f"{middle[fusion, engine, load, count]:.1f} ({min(rates):.1f} to {max(rates):.1f})")
                table_row(f"{fusion}, {engine}", *cells)
            ratios = [middle[fusion, "vLLM", load, n] / middle[fusion, "torch", load, n] for n in clients]
            table_row(f"{fusion}, vLLM / torch", *(f"{ratio:.2f}" for ratio in ratios))
        for engine in ("vLLM", "torch"):
            ratios = [middle["deep", engine, load, n] / middle["early", engine, load, n] for n in clients]
            table_row(f"deep / early, {engine}", *(f"{ratio:.2f}" for ratio in ratios))


def print_limits(found: Found, clients: Sequence[int]) -> None:
    """Medians over the rounds: latency, processor time per request by process, vLLM's own figures."""
    for load in LOADS:
        print(f"\n### What a request of {load} takes\n")
        table_head("", "clients", "latency", "processor ms per request", "cores busy", "vLLM says")
        for fusion, engine, count in [(f, e, n) for f in ("deep", "early") for e in ("vLLM", "torch") for n in clients]:
            figures = found[fusion, engine, load, count]
            cpu = {name: statistics.median(values) for name, values in figures.cpu.items()}
            own = {name: statistics.median(values) for name, values in figures.own.items()}
            busy = sum(cpu.values()) * statistics.median(figures.rates)
            table_row(
                f"{fusion}, {engine}",
                str(count),
                f"{1000 * statistics.median(figures.latencies):.0f} ms",
                ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in cpu.items()),
                f"{busy:.2f}",
                ", ".join(f"{name} {value:.3g}" for name, value in own.items()),
            )


@torch.inference_mode()
def print_floor(fusion: str, folder: Path, options: argparse.Namespace) -> None:
    """What the model alone takes, in plain torch in this process, once all servers have ended."""
    device = pick_device("auto")
    model, processor = load_model(folder, device, pick_dtype(options.dtype, device))
    runner = ModelRunner(model.requires_grad_(False), max(options.clients), image_cache_bytes=0)
    (asked,) = held_out(options.seed, 0, 1)
    data = base64.b64decode(asked.url.partition(",")[2])
    picture = decode_image(data, "image", Limits.image_pixels)
    image = prepare_image(picture, processor)
    content = [{"type": "image"}, {"type": "text", "text": asked.question.text}]
    chat = processor.chat.encode(
        [{"role": "user", "content": content}], processor.placeholders([picture]), add_generation_prompt=True
    )
    visuals = runner.encode([image])
    prompt = Prompt(chat.input_ids, visuals)
    sizes = dict.fromkeys(("vision_tower", "multi_modal_projector", "cross_attention", "language_model"), 0)
    for name, parameter in model.named_parameters():
        sizes[next(part for part in sizes if part in name)] += parameter.numel()
    print(f"\n### The {fusion} model alone, in torch on {device.type} ({torch.get_num_threads()} threads)\n")
    shown = ", ".join(f"{part} {size / 1e6:.2f} M" for part, size in sizes.items())
    print(f"{shown} parameters; a prompt of {len(prompt.input_ids)} tokens.\n")
    table_head("what", "ms", "operators", "MFLOP")
    read = timed(lambda: prepare_image(decode_image(data, "image", Limits.image_pixels), processor))
    table_row("read and scale a picture", f"{read:.2f}", "", "")
    encode = cost("encode it", lambda: runner.encode([image]))
    prefill = cost("read a prompt", lambda: runner.prefill([prompt], 0))
    bounds = []
    for rows in options.clients:
        for row in range(rows):
            runner.prefill([prompt], row)
        runner.show([runner.media_of(visuals)] * rows)
        ids, places = [prompt.input_ids[-1]] * rows, [len(prompt.input_ids)] * rows
        step = cost(f"a step of {rows} rows", partial(runner.decode, ids, places))
        bounds.append(1000 / (encode + prefill + (options.tokens - 1) * step / rows))
    left, right = torch.randn(2, 1024, 1024, device=device, dtype=model.dtype)
    speed = 2 * 1024**3 / 1e6 / timed(lambda: left @ right)
    shown = ", ".join(f"{bound:.1f}" for bound in bounds)
    print(f"\nRequests/s of {options.tokens} tokens at most, if there were nothing else to do: {shown}.")
    print(f"A large matrix product reaches {speed:.0f} GFLOP/s here; all weights are {size_of(model):.1f} MB.")


class Operators(TorchDispatchMode):
    """Counts what is called below it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cost(what: str, work: Callable[[], object]) -> float:
    """Milliseconds of a piece of work; prints its row."""
    taken = timed(work)
    with Operators() as operators:
        work()
    with FlopCounterMode(display=False) as counter:
        work()
    table_row(what, f"{taken:.2f}", str(operators.count), f"{counter.get_total_flops() / 1e6:.2f}")
    return taken


def size_of(model: torch.nn.Module) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6


def timed(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Milliseconds, the least of as many as fit: what it takes when nobody else wants the cores."""
    taken: list[float] = []
    work()
    while sum(taken) < seconds:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 1000 * min(taken)


def table_head(*names: str) -> None:
    table_row(*names)
    table_row(*["---"] * len(names))


def table_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
