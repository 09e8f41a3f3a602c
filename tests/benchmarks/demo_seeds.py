"""The demo over several seeds and sets of vector instructions: what it answers rightly, and how long it takes.

python tests/benchmarks/demo_seeds.py --out runs/seeds --fusion early deep --seeds 0 1 2 3 4 --capabilities default avx2

A capability is one of ATEN_CPU_CAPABILITY: default, avx2, avx512. What is finished in the folder is not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

from support import COMMAND

COLUMNS = ("accuracy", "blind", "shuffled", "unseen_pairs")


def run(fusion: str, seed: int, capability: str, out: Path) -> dict[str, float]:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [*COMMAND, "demo", "--fusion", fusion, "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, float] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fusion", nargs="+", default=["early", "deep"], choices=["early", "deep"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--capabilities", nargs="+", default=["avx512", "avx2"])
    options = parser.parse_args()
    print(f"| fusion | capability | seed | {' | '.join(COLUMNS)} | seconds |")
    print("|---|---|---|" + "---|" * (len(COLUMNS) + 1))
    found: dict[str, list[float]] = defaultdict(list)
    for fusion in options.fusion:
        for capability in options.capabilities:
            for seed in options.seeds:
                summary = run(fusion, seed, capability, options.out / f"{fusion}-{capability}-{seed}")
                found[fusion].append(summary["accuracy"])
                cells = " | ".join(f"{100 * summary[name]:.1f} %" for name in COLUMNS)
                print(f"| {fusion} | {capability} | {seed} | {cells} | {summary['seconds']:.0f} |", flush=True)
    for fusion, values in found.items():
        low, middle, high = (100 * pick(values) for pick in (min, statistics.median, max))
        print(f"{fusion}: median {middle:.1f} % ({low:.1f} to {high:.1f}) of {len(values)} runs")


if __name__ == "__main__":
    main()
