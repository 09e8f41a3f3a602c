"""What reading data costs: how full packed rows are, memory over a million rows, the first batch of a gigabyte, `vlm
data check`, going on at row 900,000, and how much faster than the demo's model the loader is.

    python tests/benchmarks/data.py [--only fill memory first check resume feed] [--out DIR] [--small]

Every measurement is a process of its own, repeated --rounds times; tables hold medians, with the lowest and highest
where they differ. Before each it waits (--patience seconds at most) until others leave the cores alone; "others" in the
last column are cores that were busy with other things meanwhile. DIR keeps the files (5 GB, else in a temporary folder)
and figures.json. All of it takes some 35 minutes on two calm cores; with --small one case of each kind is tried in
about one, and means nothing.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_files import (
    llava_rows,
    text_rows,
    write_array,
    write_lines,
    write_parquet,
    write_photographs,
    write_shared_images,
)
from support import COMMAND, ROOT, figures, head, line, middles, others

from data.scenes.write import write_scenes

HERE = Path(__file__).resolve().parent
TOKENS = 2048  # of a packed row
Case = TypeVar("Case")


@dataclass(frozen=True)
class Sizes:
    lengths: int = 50_000  # rows of which the fill is measured
    marks: tuple[int, ...] = (10_000, 100_000, 500_000, 1_000_000)
    array: int = 750_000  # rows of the big array, a gigabyte
    checked: int = 400_000
    photographs: int = 10_000
    stream: int = 1_000_000
    resumed: int = 900_000
    group: int = 10_000  # rows that lie together in a Parquet file
    scenes: int = 3000
    seconds: float = 6.0  # of learning


SMALL = Sizes(2000, (500, 1000, 2000, 4000), 5000, 5000, 300, 5000, 4000, 1000, 100, 1.0)


@dataclass
class Bench:
    folder: Path
    sizes: Sizes
    rounds: int
    patience: float
    found: dict[str, Any]

    def make(self, name: str, write: Callable[[Path], object]) -> Path:
        """A file or folder of this name, written once."""
        path = self.folder / name
        if not path.exists():
            write(path)
        return path

    def some(self, cases: Sequence[Case]) -> Sequence[Case]:
        """All cases, or the last alone where things are only tried."""
        return cases[-1:] if self.sizes == SMALL else cases

    def work(self, name: str, rounds: int | None = None, **options: Any) -> list[dict[str, Any]]:
        """Figures of a piece of data_work.py, once for each round."""
        command = [sys.executable, str(HERE / "data_work.py"), name, json.dumps(options)]
        return [self.run(command) for _ in range(rounds or self.rounds)]

    def vlm(self, *arguments: str) -> list[dict[str, Any]]:
        return [self.run([*COMMAND, *arguments]) for _ in range(self.rounds)]

    def run(self, command: Sequence[str]) -> dict[str, Any]:
        """`figures` of a command, which keeps what it caches in the folder."""
        cache = {"VLM_CACHE": "index", "HF_HOME": "hf"}
        own = {name: str(self.folder / below) for name, below in cache.items()}
        return figures(command, self.patience, {**own, "HF_HUB_OFFLINE": "1"})

    def keep(self, name: str, rounds: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        self.found[name] = [{key: value for key, value in each.items() if key != "bad_rows"} for each in rounds]
        (self.folder / "figures.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        print(".", end="", file=sys.stderr, flush=True)
        return rounds


def measure_fill(bench: Bench) -> None:
    """Rows as long as mix665k's, through the loader: none and bucket pad 8 rows to the longest of them."""
    sys.path.append(str(ROOT / "tests" / "data"))
    import numpy as np
    from mix665k import lengths_like_mix665k

    def write(path: Path) -> None:
        both = zip(*lengths_like_mix665k(bench.sizes.lengths, np.random.default_rng(0)), strict=True)
        rows = ({"question": "?", "answer": f"{length} {images}"} for length, images in both)
        write_lines(path, map(json.dumps, rows))

    path = bench.make("lengths.jsonl", write)
    head(f"Fill of {bench.sizes.lengths} rows as long as mix665k's", "rows", "window", "fill", "rows a forward reads")
    for mode, window in bench.some([("none", 1024), ("bucket", 1024), ("pack", 256), ("pack", 4096), ("pack", 1024)]):
        options = {"path": str(path), "mode": mode, "window": window, "tokens": TOKENS}
        rounds = bench.keep(f"fill {mode} {window}", bench.work("fill", rounds=1, **options))
        line(mode, str(window) if mode != "none" else "", f"{rounds[0]['fill']:.4f}", str(rounds[0]["rows"]))


def measure_memory(bench: Bench) -> None:
    """A million short chats, tokenised: memory of all processes, pages they share counted once."""
    marks = bench.sizes.marks
    path = bench.make("text.jsonl", lambda path: write_lines(path, text_rows(marks[-1] * 21 // 20, 8, most_turns=1)))
    head("MB after so many rows", "", *(f"{mark:,}" for mark in marks), "later - first", "rows/s", "others")
    for held, mode, until in bench.some([(True, "none", marks[:2]), (False, "none", marks), (False, "pack", marks)]):
        options = {"path": str(path), "in_memory": held, "mode": mode, "workers": 2, "marks": until}
        (found,) = bench.keep(f"memory {held} {mode}", bench.work("memory", rounds=1, **options))
        told = [found["megabytes"][str(mark)] for mark in until]
        line(
            "all rows in memory" if held else mode,
            *(f"{each:.0f}" for each in told),
            *[""] * (len(marks) - len(until)),
            f"{found['least'] - told[0]:+.0f} to {found['most'] - told[0]:+.0f}",
            f"{found['rows_per_second']:.0f}",
            others([found]),
        )


def measure_first(bench: Bench) -> None:
    """A LLaVA JSON of a gigabyte, one array, from the command to the first batch of 16 rows with their pictures."""
    bench.make("images", write_shared_images)
    path = bench.make("big.json", lambda path: write_array(path, llava_rows(bench.sizes.array, 55)))
    for cache in ("index", "hf"):
        shutil.rmtree(bench.folder / cache, ignore_errors=True)
    size = path.stat().st_size / 1e9
    head(
        f"First batch of {bench.sizes.array} rows, {size:.2f} GB",
        "",
        "seconds",
        "imports",
        "opening",
        "batch",
        "peak MB",
        "others",
    )
    for name, options, rounds in bench.some([("first run, none", "none", 1), ("none", "none", 0), ("pack", "pack", 0)]):
        found = bench.keep(f"first {name}", bench.work("first_batch", rounds or None, path=str(path), mode=options))
        cells = middles(found, "seconds", "imports", "opening", "batch")
        line(name, *cells, *middles(found, "peak_mb", digits=0), others(found))
    for name, peer in bench.some(
        [
            ("datasets, first call", "datasets_json"),
            ("datasets, from its cache", "datasets_json"),
            ("json.load alone", "json_load"),
        ]
    ):
        found = bench.keep(f"first {name}", bench.work(peer, 1, path=str(path)))
        line(name, *middles(found, "seconds"), "", "", "", *middles(found, "peak_mb", digits=0), others(found))


def measure_check(bench: Bench) -> None:
    """`vlm data check`, the whole command by the clock, its start included."""
    bench.make("images", write_shared_images)
    rows = bench.make("checked.jsonl", lambda path: write_lines(path, llava_rows(bench.sizes.checked, 8)))
    photographs = bench.make("photographs", lambda path: write_photographs(path, bench.sizes.photographs))
    head("vlm data check", "", "a second", "seconds", "processor seconds", "others")
    for what, path, count in (
        (f"{bench.sizes.checked} rows, {rows.stat().st_size / bench.sizes.checked:.0f} bytes each", rows,
         bench.sizes.checked),
        (f"{bench.sizes.photographs} rows with a photograph each", photographs / "rows.jsonl", bench.sizes.photographs),
    ):  # fmt: skip
        found = bench.keep(f"check {path.name}", bench.vlm("data", "check", str(path), "--json"))
        if any(each["rows"] != count or each["good"] != count for each in found):
            raise SystemExit(f"{path}: {count} good rows, and check found others")
        rates = [{"rate": count / each["seconds"]} for each in found]
        line(what, *middles(rates, "rate", digits=0), *middles(found, "seconds", "cpu"), others(found))
    for what, peer, options in (
        ("json.loads of every line, one process", "parse_lines", {"path": str(rows)}),
        ("sizes of all photographs by Pillow, one process", "headers", {"folder": str(photographs / "images")}),
    ):
        found = bench.keep(f"check {peer}", bench.work(peer, **options))
        line(what, *middles(found, "per_second", digits=0), *middles(found, "seconds", "cpu"), others(found))


def measure_resume(bench: Bench) -> None:
    """From a state to the next rows, in a new process; what comes is compared with what would have come."""
    count, row, group = bench.sizes.stream, bench.sizes.resumed, bench.sizes.group
    several = bench.make("several", lambda path: write_parquet(path, count, 8, group))
    one = bench.make("one", lambda path: write_parquet(path, count, 1, count))
    lines = bench.make("numbered.jsonl", lambda path: write_lines(path, text_rows(count, 8)))
    cases = bench.some(
        [
            ("JSONL by number", lines, False),
            ("stream, a Parquet file of one row group", one, True),
            ("stream, 8 Parquet files", several, True),
        ]
    )

    def stop(case: tuple[str, Path, bool]) -> Sequence[dict[str, Any]]:
        """Reads up to the row: minutes that aren't measured, so all cases at once."""
        _, path, stream = case
        state = str(bench.folder / f"{path.name}.state.json")
        return bench.work("write_state", 1, path=str(path), stream=stream, row=row, out=state)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = [found[0]["bytes"] for found in pool.map(stop, cases)]
    head(f"Going on at row {row}", "", "seconds", "without imports", "bytes of state", "others")
    for (name, path, stream), size in zip(cases, sizes, strict=True):
        state = bench.folder / f"{path.name}.state.json"
        found = bench.keep(f"resume {name}", bench.work("resume", path=str(path), stream=stream, state=str(state)))
        line(name, *middles(found, "seconds", "rows"), str(size), others(found))
    for name, path in bench.some([("a Parquet file of one row group", one), ("8 Parquet files", several)]):
        found = bench.keep(f"skip {name}", bench.work("skip", path=str(path), row=row))
        line(f"datasets' skip, {name}", *middles(found, "seconds"), "", "", others(found))


def measure_feed(bench: Bench) -> None:
    """The demo's longest stage, every picture decoded anew: rows that the loader gives and that the model learns."""
    scenes = bench.folder / "scenes"
    work = {"scenes": str(scenes), "rows": bench.sizes.scenes // 2, "seconds": bench.sizes.seconds}
    write_scenes(scenes, train=bench.sizes.scenes, heldout=6, unseen=6, lessons=60, text_rows=60)
    head("Rows/s of the demo", "", "learned", "loaded, 0 workers", "ratio", "loaded, 2 workers", "ratio", "others")
    for fusion in bench.some(["deep", "early"]):
        for threads in bench.some(sorted({1, os.cpu_count() or 1})):
            found = bench.keep(f"feed {fusion} {threads}", bench.work("feed", fusion=fusion, threads=threads, **work))
            cells = middles(found, "learns", digits=0)
            for workers in (0, 2):
                ratios = [{"ratio": each[f"workers {workers}"] / each["learns"]} for each in found]
                cells += [*middles(found, f"workers {workers}", digits=0), *middles(ratios, "ratio", digits=1)]
            line(f"{fusion}, {threads} thread{'s' * (threads > 1)}", *cells, others(found))


MEASURED = {
    "fill": measure_fill,
    "memory": measure_memory,
    "first": measure_first,
    "check": measure_check,
    "resume": measure_resume,
    "feed": measure_feed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=10, help="seconds to wait for a calm moment (default 10)")
    options = parser.parse_args()
    if options.small:
        options.rounds, options.patience = 1, 0
    print(f"load of the machine before: {os.getloadavg()[0]:.2f} of {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() if options.out is None else nullcontext(options.out) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder).resolve()
        kept = path / "figures.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        bench = Bench(path, SMALL if options.small else Sizes(), options.rounds, options.patience, found)
        for name in options.only:
            MEASURED[name](bench)


if __name__ == "__main__":
    main()
