"""What an evaluation asks: settings, questions and prompts, in an order that any number of processes shares."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.benchmarks import Benchmark, Item, find_benchmark
from data.benchmarks.columns import load_items
from data.benchmarks.files import check_pictures
from data.benchmarks.predictions import unique
from data.pictures import MissingImage
from train.evaluation.journal import digest, model_hash
from train.evaluation.prompts import CONTROLS, Prompt, Shots, make_prompts
from vlm.checkpoint import ADAPTER_CONFIG, check_source
from vlm.errors import UserError
from vlm.hub import fetch

ENGINES = ("torch", "vllm")  # or a URL


@dataclass(frozen=True)
class Question:
    """What is asked of which model: with the same settings an evaluation goes on where it was stopped.

    engine: torch, vllm, or the URL of an OpenAI API; prompt and max_tokens: by default the benchmark's own; shots:
    how many demonstrations stand before each question, drawn from shots_data; rank: choices by their likelihood.
    """

    model: str
    task: str
    data: Path
    images: Path | None = None
    split: str | None = None
    columns: tuple[str, ...] = ()
    engine: str = "torch"
    limit: int | None = None
    control: str = "none"
    seed: int = 0
    prompt: str | None = None
    max_tokens: int | None = None
    mode: str = "official"
    shots: int = 0
    shots_data: Path | None = None
    shots_images: Path | None = None
    shots_split: str | None = None
    rank: bool = False
    batch_size: int = 64
    precision: str = "auto"
    device: str = "auto"
    vllm_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES and not self.engine.startswith(("http://", "https://")):
            raise UserError(
                f"--engine {self.engine}: torch, vllm, or the URL of an OpenAI API, such as http://host:8000"
            )
        if self.prompt is not None and "{question}" not in self.prompt and self.task != "coco-caption":
            raise UserError(f"--prompt {self.prompt!r}: has no {{question}} in it, where the question goes")
        if self.rank and self.engine != "torch":
            raise UserError("--rank needs the probabilities of whole answers, which only --engine torch gives here")
        if self.shots and self.shots_data is None:
            raise UserError(
                "--shots takes demonstrations from --shots-data: the train split's files, in the same format"
            )


@dataclass(frozen=True)
class Means:
    """How it is done; nothing of it changes an answer. shard: which of `shards` parts is done here, from 1;
    allow_partial: questions whose pictures are missing fail, and don't stop the others."""

    allow_partial: bool = False
    retry_failed: bool = False
    shard: int = 1
    shards: int = 1
    concurrency: int = 32
    api_key: str | None = None
    vllm_python: str | None = None


@dataclass(frozen=True)
class Task:
    """One question with everything that is asked for it, and the folder where its answers go."""

    question: Question
    benchmark: Benchmark
    items: list[Item]
    prompts: list[Prompt]
    settings: dict[str, Any]
    folder: Path

    def batches(self, means: Means) -> list[list[Prompt]]:
        """Of prompts of like length; the same ones however many shards there are.

        The longest first, since they need the most memory; but before them the shortest, which fail only if all do.
        """
        order = sorted(range(len(self.prompts)), key=lambda index: (-self.prompts[index].size, index))
        size = self.question.batch_size
        chunks = [
            [self.prompts[index] for index in order[start : start + size]] for start in range(0, len(order), size)
        ]
        return [*chunks[-1:], *chunks[:-1]][means.shard - 1 :: means.shards]


def make_tasks(
    question: Question, out: Path, controls: bool, allow_partial: bool = False, model_sha256: str | None = None
) -> list[Task]:
    """model_sha256: where it's known; else that of the files that the model's folder holds."""
    if controls and question.control != "none":
        raise UserError("--controls runs both controls beside the evaluation; leave --control out")
    benchmark = find_benchmark(question.task, question.columns)
    benchmark.check_mode(question.mode)
    items = load_items(benchmark, question.data, question.images, question.split)
    unique([item.id for item in items], question.data)
    items = items[: question.limit]
    if not items:
        raise UserError(f"{question.data}: no questions in it")
    if not allow_partial:
        check_pictures(items)
    if question.rank and not all(benchmark.choices(item) for item in items):
        raise UserError(f"--rank: the questions of {question.task} have no choices to rank")
    shots = None
    if question.shots:
        shots = Shots(question.shots, _demonstrations(benchmark, question, allow_partial), question.seed)
    names = [question.control, *(CONTROLS[1:] if controls else ())]
    sha256 = model_sha256 or _hash(question)
    tasks = []
    for name in names:
        one = replace(question, control=name)
        prompts = make_prompts(benchmark, items, question.prompt or benchmark.prompt, name, question.seed, shots)
        settings = _settings(one, benchmark, prompts) | {"model_sha256": sha256}
        tasks.append(
            Task(one, benchmark, items, prompts, settings, out if one.control == question.control else out / name)
        )
    return tasks


def _demonstrations(benchmark: Benchmark, question: Question, allow_partial: bool) -> list[Item]:
    assert question.shots_data is not None
    try:
        found = load_items(benchmark, question.shots_data, question.shots_images, question.shots_split)
        if not allow_partial:
            check_pictures(found)
    except UserError as error:
        raise UserError(f"--shots-data: {error}") from None
    return [
        item for item in found if item.references and not any(isinstance(image, MissingImage) for image in item.images)
    ]


def _hash(question: Question) -> str | None:
    """Of the model's files, where they are here. UserError for what is no model."""
    if question.engine not in ENGINES:
        return None
    folder = fetch(question.model)
    if not (folder / ADAPTER_CONFIG).is_file():
        check_source(folder, "vlm" if question.engine == "torch" else None)
    return model_hash(folder)


def _settings(question: Question, benchmark: Benchmark, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What two runs must have in common for their answers to be one evaluation's."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(question).items()}
    settings["prompt"] = question.prompt or benchmark.prompt
    settings["max_tokens"] = question.max_tokens or benchmark.max_tokens
    engine = question.engine.rstrip("/").removesuffix("/v1")
    settings["engine"] = re.sub(r"//[^/@]*@", "//", engine)  # a password is nobody's business
    settings["device"] = question.device.partition(":")[0]  # GPUs of one machine are the same
    settings["questions_sha256"] = digest(prompts)
    return settings
