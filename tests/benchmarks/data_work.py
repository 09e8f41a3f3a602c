"""What tests/benchmarks/data.py measures, each piece in a process of its own: python data_work.py NAME '{"path": ...}'

The last line of the output is an object of figures.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from support import ROOT, megabytes

Figures = dict[str, Any]
SEED = 3


class Plain:
    """A preparation that makes one token of a row and a batch of where its rows stand: all that's left is reading."""

    def encode(self, record: Any, _rng: Any) -> Any:
        from data.encode import Example

        return Example([1], [1], (), record.where)

    def load(self, examples: Sequence[Any]) -> list[Any]:
        from data.collate import Sample

        return list(map(Sample, examples))

    def collate(self, rows: Sequence[Sequence[Any]]) -> Any:
        return [sample.example.where for row in rows for sample in row]


class Lengths(Plain):
    """A row is as long, and shows as many pictures, as its answer says."""

    def encode(self, record: Any, _rng: Any) -> Any:
        from data.encode import Example

        length, images = map(int, record.messages[-1]["content"][0]["text"].split())
        return Example([1] * length, [1] * length, (Path("a.jpg"),) * images, record.where)

    def collate(self, rows: Sequence[Sequence[Any]]) -> Any:
        """Rows; tokens; tokens of the longest row, to which the others are padded."""
        lengths = [sum(len(sample.example.input_ids) for sample in row) for row in rows]
        return len(lengths), sum(lengths), max(lengths, default=0)


class Chats(Plain):
    """As a stage that learns chats prepares its rows: with a tokenizer, a chat template, pixels and padding."""

    def __init__(self, texts: Sequence[str], context: int, per_image: int = 576) -> None:
        sys.path.append(str(ROOT / "tests"))
        from processors import plain_processor

        from vlm.tokenization import train_tokenizer

        self.processor = plain_processor(train_tokenizer(texts, 512, context), per_image, edge=336)
        self.context, self.per_image = context, per_image

    def encode(self, record: Any, rng: Any) -> Any:
        from data.encode import encode_record

        return encode_record(
            record, self.processor.chat, self.context, "assistant", rng, [self.per_image] * len(record.images)
        )

    def load(self, examples: Sequence[Any]) -> list[Any]:
        from data.collate import Sample, split_pixels
        from data.pictures import load_image

        counts = [len(example.images) for example in examples]
        pictures = [load_image(image) for example in examples for image in example.images]
        pixels = split_pixels(self.processor.pixels(pictures), counts, counts) if pictures else [{}] * len(counts)
        return list(map(Sample, examples, pixels))

    def collate(self, rows: Sequence[Sequence[Any]]) -> Any:
        from data.collate import collate_chat

        return collate_chat(rows, self.processor, packed=any(len(row) > 1 for row in rows))


class Texts(Chats):
    """The same of rows without pictures, and without the blank one that their batches get otherwise."""

    def collate(self, rows: Sequence[Sequence[Any]]) -> Any:
        from data.collate import collate_text

        examples = [[sample.example for sample in row] for row in rows]
        return collate_text(examples, self.processor.tokenizer.pad_token_id, any(len(row) > 1 for row in rows))


def fill(path: str, mode: str, window: int, tokens: int) -> Figures:
    """Share of real tokens over an epoch: of whole packed rows, or of what forwards of 8 rows are padded to."""
    from data.loader import Loader
    from data.mixture import Mixture
    from data.packing import Packing
    from data.sources import open_source

    mixture = Mixture([open_source(path)], SEED)
    packing: Any = Packing(mode, window=window)
    steps = Loader(mixture, Lengths(), 8, 8, packing, tokens, samples=len(mixture)).steps()
    real = room = rows = seen = 0
    while seen < len(mixture):
        step = next(steps)
        seen = step.state.seen
        for count, held, longest in step.micro_batches:
            rows, real = rows + count, real + held
            room += count * (tokens if mode == "pack" else longest)
    return {"fill": real / room, "rows": rows, "tokens": real}


def memory(path: str, in_memory: bool, mode: str, workers: int, marks: list[int]) -> Figures:
    """MB of this process and its workers when so many rows were given out, and the least and most after the first."""
    import torch

    from data.loader import Loader
    from data.mixture import Mixture
    from data.packing import Packing
    from data.sources import open_source

    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        texts = [next(file) for _ in range(200)]
    source = held_in_memory(path) if in_memory else open_source(path)
    packing: Any = Packing(mode)
    torch.set_num_threads(1)
    batch = 32 if mode == "pack" else 256  # some 1,500 rows fill 32 packed ones
    loader = Loader(Mixture([source], SEED), Texts(texts, 1024), batch, 32, packing, 1024, None, workers)
    found: dict[str, float] = {}
    between: list[float] = []
    began, looked = time.perf_counter(), 0
    for step in loader.steps():
        seen = step.state.seen
        if seen >= marks[len(found)]:
            found[str(marks[len(found)])] = megabytes()
            print(f"{seen} rows: {megabytes():.0f} MB, {seen / (time.perf_counter() - began):.0f} rows/s", flush=True)
            if len(found) == len(marks):
                break
        elif found and seen - looked >= marks[-1] // 100:
            looked = seen
            between.append(megabytes())
    rate = marks[-1] / (time.perf_counter() - began)
    later = [*between, *found.values()]
    return {"megabytes": found, "least": min(later), "most": max(later), "rows_per_second": rate}


def held_in_memory(path: str) -> Any:
    """All rows as objects, as LLaVA's trainer has them."""
    from data.rows import Source

    class Held(Source):
        def __init__(self) -> None:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123
                self.held = list(map(json.loads, file))
            super().__init__(Path(path))

        def __len__(self) -> int:
            return len(self.held)

        def where(self, index: int) -> str:
            return f"{path}:{index + 1}"

        def row(self, index: int) -> Any:
            return self.held[index]

    return Held()


def first_batch(path: str, mode: str) -> Figures:
    """The first batch of 16 rows with pictures; packed rows hold 2,048 tokens."""
    began = time.perf_counter()
    from data.loader import Loader
    from data.mixture import Mixture
    from data.packing import Packing
    from data.sources import open_source

    imported = time.perf_counter()
    source = open_source(path)
    opened = time.perf_counter()
    preparation = Chats([json.dumps(source.row(index)) for index in range(50)], 2048)
    packing: Any = Packing(mode)
    step = next(Loader(Mixture([source], SEED), preparation, 16, packing=packing, tokens=2048).steps())
    assert step.micro_batches[0].pixels["pixel_values"].shape[1:] == (3, 336, 336)
    ready = time.perf_counter()
    parts = {"imports": imported - began, "opening": opened - imported, "batch": ready - opened}
    return {"rows": len(source), "documents": step.state.seen, **parts}


def json_load(path: str) -> Figures:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        rows = json.load(file)
    return {"rows": len(rows), "first": rows[0]["id"]}


def datasets_json(path: str) -> Figures:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=path, split="train")
    return {"rows": len(rows), "first": rows[0]["id"]}


def _plain_loader(path: str, stream: bool) -> Any:
    from data.loader import Loader
    from data.mixture import Mixture
    from data.sources import open_data

    return Loader(Mixture([open_data(path, Path("/"), None, None, stream)], SEED), Plain(), 1000)


def write_state(path: str, stream: bool, row: int, out: str) -> Figures:
    """Reads up to a row; keeps the loader's state there, and what comes next."""
    began = time.perf_counter()
    steps = _plain_loader(path, stream).steps()
    for step in steps:
        if step.state.seen >= row:
            break
    seconds = time.perf_counter() - began
    kept = {"state": asdict(step.state), "next": next(steps).micro_batches[0]}
    Path(out).write_text(json.dumps(kept), encoding="utf-8")
    return {"rows_per_second": step.state.seen / seconds, "bytes": len(json.dumps(kept["state"]))}


def resume(path: str, stream: bool, state: str) -> Figures:
    """From a loader's state to the next rows, which must be those that would have come."""
    began = time.perf_counter()
    from data.loader import read_state

    imported = time.perf_counter()
    kept = json.loads(Path(state).read_text(encoding="utf-8"))
    step = next(_plain_loader(path, stream).steps(read_state(kept["state"])))
    ready = time.perf_counter()
    if step.micro_batches[0] != kept["next"]:
        raise SystemExit(f"{path}: other rows than those that come without a stop")
    return {"row": kept["state"]["seen"], "imports": imported - began, "rows": ready - imported}


def skip(path: str, row: int) -> Figures:
    """The peer: `datasets` alone, told to skip the rows that were seen."""
    import datasets

    files = sorted(map(str, Path(path).glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).skip(row)
    return {"next": next(iter(rows))["id"]}


def headers(folder: str) -> Figures:
    """The peer: sizes of all pictures of a folder by Pillow, one after the other."""
    from PIL import Image

    began, count = time.perf_counter(), 0
    for file in Path(folder).iterdir():
        with Image.open(file) as image:
            assert image.size
        count += 1
    return {"per_second": count / (time.perf_counter() - began)}


def parse_lines(path: str) -> Figures:
    """The peer: json.loads of every line, and nothing else."""
    began = time.perf_counter()
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        count = sum(1 for line in file if json.loads(line))
    return {"per_second": count / (time.perf_counter() - began)}


def feed(scenes: str, fusion: str, threads: int, rows: int, seconds: float) -> Figures:
    """Rows/s that the demo's model learns from in its longest stage, and that loaders give it, in turn."""
    import torch
    from accelerate import Accelerator

    from data.loader import ImageCache, Loader
    from train.loop import _prepare_process, count_step, open_mixture, optimizer_step
    from train.objectives import build_objective
    from train.parts import make_optimizer, split_into_parts
    from train.recipe import Backbone, load_recipe
    from train.runs import Run
    from vlm.settings import find_config

    read = {name: load_recipe(find_config(f"demo/{name}.yaml"), [f"data_root={scenes}"]) for name in
            (fusion, "clip", "language")}  # fmt: skip
    parts = {name: Backbone(config=getattr(read[name if name == "language" else "clip"].model, name).config)
             for name in ("vision", "language")}  # fmt: skip
    model = replace(read[fusion].model, **parts, tokenizer_vocab=read["language"].model.tokenizer_vocab)
    stage = next(stage for stage in read[fusion].stages if stage.name == "learn")
    recipe = replace(read[fusion], model=model, stages=(stage,), threads=threads)
    _prepare_process(recipe, torch.device("cpu"))
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        objective = build_objective(recipe, stage, Run(Path(folder)), ImageCache(recipe.image_cache_mb << 20))
    mixture = open_mixture(recipe, stage, 0)

    def loaded(workers: int) -> Iterator[Any]:
        return Loader(mixture, objective, stage.batch_size, None, stage.packing, objective.room, None, workers).steps()

    def rate(steps: Iterable[Any]) -> float:
        began = time.perf_counter()
        return sum(1 for _ in steps) * stage.batch_size / (time.perf_counter() - began)

    given: Figures = {}
    for workers in (0, 2):
        objective.read = ImageCache(recipe.image_cache_mb << 20)  # every picture is decoded, as in a first epoch
        some = loaded(workers)
        next(some)
        given[f"workers {workers}"] = rate(islice(some, rows // stage.batch_size))
    batches = list(islice(loaded(0), 50))
    groups = split_into_parts(objective.model, stage)
    network, optimizer = accelerator.prepare(objective.model, make_optimizer(groups, stage))
    network.train()

    def learned(seconds: float) -> Iterator[Figures]:
        began = time.perf_counter()
        for step in cycle(batches):
            counts = count_step(step, False, accelerator)
            assert counts["seen"]
            assert not counts["bad"]
            yield optimizer_step(objective, network, optimizer, step.micro_batches, stage, accelerator, counts)
            if time.perf_counter() - began > seconds:
                return

    rate(learned(seconds / 5))
    return {**given, "learns": rate(learned(seconds))}


WORK: dict[str, Callable[..., Figures]] = {
    work.__name__: work
    for work in (
        fill, memory, first_batch, json_load, datasets_json, write_state, resume, skip, headers, parse_lines, feed
    )
}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(WORK[sys.argv[1]](**json.loads(sys.argv[2]))))
