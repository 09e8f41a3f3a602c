"""Evaluation: a benchmark's questions, a model's answers, the score, and what the model would score without looking."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.progress import track

import vlm
from data.benchmarks import Benchmark, Item, Scores, find_benchmark
from data.benchmarks.predictions import unique
from data.pictures import ImageRef
from train.answer import Answerer, Question
from vlm.checkpoint import load, written_aside
from vlm.device import pick_device, pick_dtype
from vlm.errors import UserError

CONTROLS = ("none", "blind", "shuffled")
SCORES = "scores.json"


@dataclass(frozen=True)
class Evaluation:
    """Items, the model's answer to each, and the scores; `control` says what was done to the images."""

    items: list[Item]
    answers: dict[str, str]
    scores: Scores
    control: str
    seconds: float


def ask(
    answerer: Answerer,
    benchmark: Benchmark,
    items: Sequence[Item],
    control: str,
    seed: int,
    quiet: bool = False,
) -> dict[str, str]:
    """Answers of the model, by item. blind withholds the images, shuffled shows each item another item's image."""
    images = controlled_images(items, control, seed)
    questions = [
        Question(item.id, benchmark.prompt.format(question=item.question), image)
        for item, image in zip(items, images, strict=True)
    ]
    answered = answerer.answers(questions)
    return dict(track(answered, f"{benchmark.task} ({control})", total=len(questions), disable=quiet, transient=True))


def controlled_images(items: Sequence[Item], control: str, seed: int) -> list[ImageRef | None]:
    """The image that each item is asked about. shuffled: a permutation that leaves no item its own picture."""
    images = [item.image for item in items]
    if control == "none":
        return images
    if control == "blind":
        return [None] * len(images)
    if len(set(images)) < 2:
        raise UserError("--control shuffled needs at least two different images")
    rng = np.random.default_rng(seed)
    shuffled = [images[i] for i in rng.permutation(len(images))]
    for i, image in enumerate(images):
        if shuffled[i] == image:
            others = [j for j in range(len(images)) if images[j] != image and shuffled[j] != image]
            if not others:
                raise UserError("--control shuffled: one image belongs to more than half of the items")
            j = others[int(rng.integers(len(others)))]
            shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled


def evaluate(
    model: str,
    task: str,
    data: Path,
    images: Path | None,
    out: Path,
    limit: int | None = None,
    control: str = "none",
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    max_tokens: int = 32,
) -> Evaluation:
    """Asks the model in the folder or hub id `model` all questions of `data`; leaves an evaluation folder in `out`.

    An evaluation that is there already is replaced. Questions without references are answered, but not scored.
    """
    from train.pages import write_evaluation_page

    if out.exists() and not (out.is_dir() and ((out / SCORES).is_file() or not any(out.iterdir()))):
        raise UserError(f"{out}: there already, and not an evaluation folder; use another --out")
    benchmark = find_benchmark(task)
    items = benchmark.items(data, images)
    unique([item.id for item in items], data)
    items = items[:limit]
    if not items:
        raise UserError(f"{data}: no questions in it")
    where = pick_device(device)
    network, processor = load(model, where, pick_dtype(precision, where))
    answerer = Answerer(network, processor, batch_size, max_tokens)
    began = time.perf_counter()
    answers = ask(answerer, benchmark, items, control, seed)
    answers = {item.id: answers[item.id] for item in items}
    seconds = time.perf_counter() - began
    with written_aside(out) as partial:
        predictions = partial / benchmark.submission_name
        predictions.write_text(benchmark.submission(answers), encoding="utf-8")
        referenced = [item for item in items if item.references]
        scores = benchmark.score(referenced, answers) if referenced else Scores(task, "official", {}, {})
        result = Evaluation(items, answers, scores, control, seconds)
        settings = {
            "model": model,
            "data": str(data),
            "control": control,
            "seed": seed,
            "limit": limit,
            "prompt": benchmark.prompt,
            "decoding": {"greedy": True, "max_tokens": max_tokens},
            "versions": {
                "vlm": vlm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "seconds": seconds,
        }
        report = {**scores.as_json(per_item=True), "failed": 0, "unscored": len(items) - scores.n, "settings": settings}
        (partial / SCORES).write_text(json.dumps(report, indent=1), encoding="utf-8")
        write_evaluation_page(result, settings, partial / "report.html")
    return result
