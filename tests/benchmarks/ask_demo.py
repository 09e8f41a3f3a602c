"""The demo's held-out questions, asked of a demo model on both engines.

    python tests/benchmarks/ask_demo.py runs/demo/model --vllm-python ~/vllm/bin/python

Asks both servers over HTTP, in fp32, and prints how many answers of each were right, and how many differ. Exits
with 1 when the accuracies differ by more than 0.2 points. Flags behind -- are vLLM's.
"""

import argparse
import sys
from pathlib import Path

from load import ask, held_out, serving

MOST_POINTS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM (default: this)")
    parser.add_argument("--seed", type=int, default=0, help="the demo's (default: 0)")
    parser.add_argument("--questions", type=int, default=1002, help="default: 1002, which is all that the demo has")
    parser.add_argument("--clients", type=int, default=16)
    options, flags = split(parser, sys.argv[1:])
    asked = held_out(options.seed, 0, options.questions)
    bodies = [each.body(max_tokens=16) for each in asked]
    of_engine = {"torch": [], "vllm": ["--vllm-python", options.vllm_python, *(["--", *flags] if flags else [])]}
    said: dict[str, list[str]] = {}
    right: dict[str, float] = {}
    for engine, own in of_engine.items():
        with serving(options.model, engine, "--dtype", "fp32", *own) as server:
            said[engine] = [text.strip() for text in ask(server.port, bodies, options.clients).texts]
        hits = [text == each.question.answer for text, each in zip(said[engine], asked, strict=True)]
        right[engine] = 100 * sum(hits) / len(hits)
        print(f"{engine}: {sum(hits)} of {len(hits)} right ({right[engine]:.2f} %)", flush=True)
    points = abs(right["vllm"] - right["torch"])
    differ = [i for i in range(len(asked)) if said["torch"][i] != said["vllm"][i]]
    print(f"difference: {points:.2f} points; {len(differ)} answers differ")
    for i in differ[:20]:
        question = asked[i].question
        print(f"  {i}: {question.text} ({question.answer}) torch: {said['torch'][i]!r}, vllm: {said['vllm'][i]!r}")
    sys.exit(points > MOST_POINTS)


def split(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and what stands behind --."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:end]), arguments[end + 1 :]


if __name__ == "__main__":
    main()
