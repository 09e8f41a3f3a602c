"""The published recipe in miniature: everything from nothing, trained, evaluated, asked, and ready to serve."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from data.benchmarks import Item, find_benchmark
from data.benchmarks.files import check_pictures
from data.pictures import ImageRef, load_image
from data.scenes.write import write_scenes
from train.evaluation.local import LocalModel
from train.evaluation.prompts import make_prompts
from train.loop import run_training
from train.pages import Sample, make_sample, write_run_page
from train.recipe import Recipe, load_recipe
from train.runs import Run
from vlm.checkpoint import link_folder, load
from vlm.device import pick_device
from vlm.errors import UserError
from vlm.settings import dump, find_config
from vlm.threads import describe_threads, processor_name

QUICK = {"train": 240, "heldout": 60, "unseen": 24, "lessons": 60, "text_rows": 240}
QUICK_STEPS = 12
SHOWN_SAMPLES = 48
BATCH = 64  # questions asked at once


class Demo:
    """One demo in one folder; what is done there already is not done again."""

    def __init__(self, out: Path, fusion: str, seed: int, quick: bool) -> None:
        self.out, self.fusion, self.seed, self.quick = out, fusion, seed, quick
        self.console = Console()
        self.scenes = out / "scenes"
        self.runs = {name: Run(out / "runs" / name) for name in ("clip", "language", fusion)}
        self.timings_file = out / "timings.json"
        self.timings: dict[str, float] = {}
        self.figures: dict[str, Any] = {}
        self.samples: list[Sample] = []
        self.example: tuple[Item, str] | None = None

    def claim(self) -> None:
        """Makes the folder this demo's; UserError if another demo or something else lives there."""
        settings = {"fusion": self.fusion, "seed": self.seed, "quick": self.quick}
        marker = self.out / "demo.json"
        if marker.is_file():
            held = json.loads(marker.read_text(encoding="utf-8"))
            if held != settings:
                raise UserError(f"{self.out}: holds a demo with other settings ({held}); use another --out")
        elif self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"{self.out}: not empty, and not a demo; use another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(settings), encoding="utf-8")
        if self.timings_file.is_file():
            self.timings = json.loads(self.timings_file.read_text(encoding="utf-8"))

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Does a piece of work and remembers how long it took, over all tries."""
        began = time.perf_counter()
        try:
            work()
        finally:
            spent = time.perf_counter() - began
            if spent > 1 or name not in self.timings:
                self.timings[name] = self.timings.get(name, 0.0) + spent
            self.timings_file.write_text(json.dumps(self.timings), encoding="utf-8")

    def recipe(self, name: str) -> Recipe:
        overrides = [f"seed={self.seed}", f"data_root={self.scenes}"]
        if name == self.fusion:
            overrides += [
                f"model.vision.pretrained={self.runs['clip'].model.resolve()}",
                f"model.language.pretrained={self.runs['language'].model.resolve()}",
            ]
        else:
            overrides.append("threads=1")
        recipe = load_recipe(find_config(f"demo/{name}.yaml"), overrides)
        if self.quick:
            recipe = replace(recipe, stages=tuple(replace(stage, steps=QUICK_STEPS) for stage in recipe.stages))
        return recipe

    def draw_scenes(self) -> None:
        counts: dict[str, Any] = QUICK if self.quick else {}
        write_scenes(self.scenes, seed=self.seed, **counts)

    def pretrain(self) -> None:
        """Encoder and language model don't depend on each other: one process, and one core, for each."""
        waiting = {name: self.runs[name] for name in ("clip", "language") if not self.runs[name].finished}
        if not waiting:
            return
        processes = {name: self._start(name, run) for name, run in waiting.items()}
        columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            steps = {name: sum(stage.steps or 0 for stage in self.recipe(name).stages) for name in waiting}
            bars = {name: progress.add_task(name, total=total) for name, total in steps.items()}
            try:
                while any(process.poll() is None for process in processes.values()):
                    time.sleep(0.5)
                    for name, run in waiting.items():
                        lines = run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.is_file() else 0
                        progress.update(bars[name], completed=lines)
            finally:
                for process in processes.values():
                    process.terminate()  # a no-op for those that are done; the others write a checkpoint and stop
                    process.wait()
        for name, process in processes.items():
            if process.returncode:
                last = self._log(name).read_text(encoding="utf-8").strip().splitlines()[-1:]
                raise UserError(f"{name}: {''.join(last)} (all of it: {self._log(name)})")

    def fuse(self) -> None:
        run_training(self.recipe(self.fusion), self.runs[self.fusion].folder, resume=True)
        if not (self.out / "model").is_dir():
            link_folder(self.runs[self.fusion].model, self.out / "model")

    def evaluate(self) -> None:
        """Held-out scenes with both controls, and scenes with never-seen pairs; summary.json and report.html."""
        benchmark = find_benchmark("exact")
        heldout = benchmark.items(self.scenes / "heldout.jsonl", None)
        unseen = benchmark.items(self.scenes / "unseen.jsonl", None)
        check_pictures([*heldout, *unseen])
        model = LocalModel(*load(self.out / "model", pick_device("auto")), max_tokens=16)

        def ask(items: list[Item], control: str) -> dict[str, str | None]:
            prompts = make_prompts(benchmark, items, benchmark.prompt, control, self.seed)
            batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
            return {reply.id: reply.answer for replies in model.replies(batches) for reply in replies}

        def accuracy(items: list[Item], control: str) -> float:
            return benchmark.score(items, ask(items, control)).metrics["accuracy"]

        answers = ask(heldout, "none")
        scores = benchmark.score(heldout, answers)

        self.figures = {
            "fusion": self.fusion,
            "seed": self.seed,
            "n": len(heldout),
            "accuracy": scores.metrics["accuracy"],
            "blind": accuracy(heldout, "blind"),
            "shuffled": accuracy(heldout, "shuffled"),
            "unseen_pairs": accuracy(unseen, "none"),
            "kinds": {name.partition("/")[2]: value for name, value in scores.metrics.items() if "/" in name},
        }
        self.samples = [
            make_sample(item, answers[item.id] or "", scores.per_item[item.id]) for item in heldout[:SHOWN_SAMPLES]
        ]
        self.example = (heldout[0], answers[heldout[0].id] or "")

    def conclude(self) -> None:
        """summary.json, report.html, the table, one answered question with its picture, and how to serve."""
        stages = [
            {
                "name": stage.name,
                "seconds": round(self._stage_seconds(run, stage.name), 1),
                "steps": run.steps_of(stage.name),
            }
            for name, run in self.runs.items()
            for stage in self.recipe(name).stages
        ]
        total = round(sum(self.timings.values()), 1)
        machine = {"processor": processor_name(), "capability": torch.backends.cpu.get_cpu_capability()}
        summary = {**self.figures, **machine, "seconds": total, "stages": stages, "timings": self.timings}
        run = self.runs[self.fusion]
        kinds = {f"accuracy on {kind}": f"{value:.1%}" for kind, value in summary["kinds"].items()}
        shown = {name: f"{summary[name]:.1%}" for name in ("accuracy", "blind", "shuffled", "unseen_pairs")}
        figures = {"held-out questions": summary["n"], **shown, **kinds, "seconds": total}
        write_run_page(run, self.out / "report.html", figures, self.samples, f"vlm demo, {self.fusion} fusion")
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self._show(summary)

    def show(self) -> None:
        """A finished demo, told again."""
        self._show(json.loads((self.out / "summary.json").read_text(encoding="utf-8")))

    def _show(self, summary: dict[str, Any]) -> None:
        table = Table(title=f"{summary['fusion']} fusion, {summary['n']} held-out questions", title_justify="left")
        table.add_column("what")
        table.add_column("figure", justify="right")
        for name, value in {**summary["kinds"], "all": summary["accuracy"]}.items():
            table.add_row(f"right answers: {name}", f"{value:.1%}")
        table.add_row("control: image withheld", f"{summary['blind']:.1%}")
        table.add_row("control: another image", f"{summary['shuffled']:.1%}")
        table.add_row("pairs that training never showed", f"{summary['unseen_pairs']:.1%}")
        for stage in summary["stages"]:
            table.add_row(f"stage {stage['name']}, {stage['steps']} steps", f"{stage['seconds']:.0f} s")
        table.add_row("everything", f"{summary['seconds']:.0f} s")
        self.console.print(table)
        if self.example is not None:
            item, answer = self.example
            assert item.image is not None
            self.console.print(draw_in_terminal(item.image))
            self.console.print(f"  {item.question}\n  [bold]{answer}[/bold]   (truth: {item.references[0]})\n")
        self.console.print(f"pictures, questions and curves: {self.out / 'report.html'}")
        self.console.print(f"serve it:  vlm serve {self.out / 'model'}", soft_wrap=True)

    def _start(self, name: str, run: Run) -> subprocess.Popen[bytes]:
        recipe = self.recipe(name)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        config = run.folder.parent / f"{name}.yaml"
        config.write_text(dump(recipe), encoding="utf-8")
        # -P keeps the current folder off the import path: a user's own train.py must not win over ours
        command = [
            sys.executable,
            "-P",
            "-m",
            "vlm.cli",
            "train",
            str(config),
            "--out",
            str(run.folder),
            "--resume",
        ]
        with self._log(name).open("ab") as log:
            # a session of its own: Ctrl-C would come from the terminal and from here, and twice means at once
            return subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
            )

    def _log(self, name: str) -> Path:
        return self.out / "runs" / f"{name}.log"

    def _stage_seconds(self, run: Run, stage: str) -> float:
        return sum(entry["seconds"] for entry in run.metrics() if entry["stage"] == stage)


def run_demo(out: Path, fusion: str, seed: int, quick: bool) -> int:
    """Everything in miniature; seven to eight minutes on two cores. Returns the exit code."""
    demo = Demo(out, fusion, seed, quick)
    demo.claim()
    demo.console.print(describe_threads(), highlight=False)
    if (out / "summary.json").is_file():
        demo.show()
        return 0
    try:
        demo.step("scenes", demo.draw_scenes)
        demo.step("pretraining", demo.pretrain)
        demo.step("fusion", demo.fuse)
        demo.step("evaluation", demo.evaluate)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run it again, and it goes on where it was") from None
    demo.conclude()
    return 0


def draw_in_terminal(image: ImageRef, width: int = 32) -> Any:
    """A picture as coloured half blocks, two pixels a character."""
    pixels = np.asarray(load_image(image).resize((width, width)))
    text = Text()
    for y in range(0, width, 2):
        text.append("  ")
        for x in range(width):
            colours = [bytes(pixels[y + down, x]).hex() for down in (0, 1)]
            text.append("▀", Style(color=f"#{colours[0]}", bgcolor=f"#{colours[1]}"))
        text.append("\n")
    return text
