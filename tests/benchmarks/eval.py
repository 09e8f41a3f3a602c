"""What scoring costs beside the official code: VQA accuracy of 214,354 questions, BLEU, ROUGE-L and CIDEr-D of 40,504
images with five references each; and what `vlm eval` costs beside its engine.

    python tests/benchmarks/eval.py [--only vqa captions throughput] [--out DIR] [--small]

Every measurement is a process of its own, scoring on one core, repeated --rounds times; tables hold medians, with the
lowest and highest where they differ. Before each it waits (--patience seconds at most) until others leave the cores
alone; cores that were busy with other things meanwhile are in the column "others". DIR keeps the
generated files and figures.json. It needs the extra "eval". With --small all is tried in a minute, and means nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, run
from typing import Any

from support import COMMAND, figures, head, line, middles, others

HERE = Path(__file__).resolve().parent
QUESTIONS, IMAGES = 214_354, 40_504  # of VQAv2's and COCO's val2014
SMALL = 100  # times smaller
CORES = os.sched_getaffinity(0)


@dataclass
class Bench:
    folder: Path
    small: bool
    rounds: int
    patience: float
    found: dict[str, Any] = field(default_factory=dict)

    def size(self, whole: int) -> int:
        return whole // SMALL if self.small else whole

    def work(self, name: str, **options: Any) -> list[dict[str, Any]]:
        """Figures of a piece of eval_work.py, once for each round."""
        return self.run(name, [sys.executable, str(HERE / "eval_work.py"), name, json.dumps(options)])

    def write(self, name: str, **options: Any) -> None:
        """In a process of its own, since the peak of memory of one counts for those that it starts."""
        run([sys.executable, str(HERE / "eval_work.py"), name, json.dumps(options)], check=True, stdout=DEVNULL)

    def run(self, name: str, command: Sequence[str], cores: int = 1) -> list[dict[str, Any]]:
        os.sched_setaffinity(0, sorted(CORES)[-cores:])  # a process that is started has them, too
        env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.found[name] = [figures(command, self.patience, env) for _ in range(self.rounds)]
        (self.folder / "figures.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        return self.found[name]


def measure_vqa(bench: Bench) -> None:
    """The scoring alone, and the whole commands with their reading of the files."""
    annotations, predictions = bench.folder / "annotations.json", bench.folder / "predictions.json"
    names = {"annotations": str(annotations), "predictions": str(predictions)}
    bench.write("write_vqa", **names, count=bench.size(QUESTIONS))
    head("VQA accuracy", "", "questions", "ours, s", "the official loop, s", "ratio", "ours, peak MB", "others")
    found = bench.work("score_vqa", **names)
    line("scoring", *(middles(found, "questions", digits=0)), *middles(found, "ours", "port", "ratio", digits=2), "",
         others(found))  # fmt: skip
    port = bench.work("official_command", **names)
    ours = bench.run("vlm score vqav2", [*COMMAND, "score", "vqav2", str(predictions), str(annotations), "--json"])
    if any(round(a["metrics"]["accuracy"], 2) != b["overall"] for a, b in zip(ours, port, strict=True)):
        raise SystemExit("the scores differ")
    ratios = [{"ratio": b["cpu"] / a["cpu"]} for a, b in zip(ours, port, strict=True)]
    line("whole command", *middles(ours, "n", digits=0), *middles(ours, "cpu", digits=2),
         *middles(port, "cpu", digits=2), *middles(ratios, "ratio"), *middles(ours, "peak_mb", digits=0),
         others([*ours, *port]))  # fmt: skip


def measure_captions(bench: Bench) -> None:
    path = bench.folder / "captions.json"
    bench.write("write_captions", path=str(path), count=bench.size(IMAGES))
    found = bench.work("score_captions", path=str(path))
    if any(each["apart"] > 1e-6 for each in found):
        raise SystemExit("the scores differ")
    names = ("BLEU, ROUGE-L and CIDEr-D", "images", "ours, s", "pycocoevalcap, s", "ratio", "furthest apart", "others")
    head("Captions", *names)
    apart = f"{max(each['apart'] for each in found):.0e}"
    line("", *middles(found, "images", digits=0), *middles(found, "ours", "theirs", "ratio", digits=2), apart,
         others(found))  # fmt: skip


def measure_throughput(bench: Bench) -> None:
    """Pictures are decoded beside the model, so it has a core more than torch has threads."""
    command = [sys.executable, str(HERE / "eval_engine.py"), str(32 if bench.small else 192)]
    found = bench.run("throughput", command, cores=2)
    head("Questions a second", "", "questions", "vlm eval", "generate alone", "ratio", "others")
    line("torch", *middles(found, "questions", digits=0), *middles(found, "eval", "engine"),
         *middles(found, "ratio", digits=3), others(found))  # fmt: skip


MEASURED = {"vqa": measure_vqa, "captions": measure_captions, "throughput": measure_throughput}


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
    with tempfile.TemporaryDirectory() if options.out is None else nullcontext(options.out) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        bench = Bench(Path(folder).resolve(), options.small, options.rounds, options.patience)
        for name in options.only:
            MEASURED[name](bench)


if __name__ == "__main__":
    main()
