"""easy-VQA from nothing: prepares the published questions, then trains and evaluates through the command line.

    python tests/benchmarks/easy_vqa.py DATA --out runs/easy_vqa [--recipe early deep] [--tower frozen learning]

DATA is the folder of easy-VQA's training half (train/questions.json, train/images). One image in five is held out.
"""

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support import ROOT, conversation, metrics, vlm, write_jsonl

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
QUESTIONS_PER_ROW = 4
PASSES = 4  # times that the questions of an image are dealt out anew
Question = tuple[str, str]


def prepare(data: Path, out: Path, seed: int) -> None:
    """Splits by image and writes captions, texts and conversations of the training images, questions of the others."""
    rng = random.Random(seed)
    questions: dict[int, list[Question]] = defaultdict(list)
    for question, answer, image in json.loads((data / "train" / "questions.json").read_text(encoding="utf-8")):
        questions[image].append((question, answer))
    images = sorted(questions)
    rng.shuffle(images)
    heldout, training = images[: len(images) // 5], images[len(images) // 5 :]
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "images").exists():
        (out / "images").symlink_to((data / "train" / "images").resolve())
    captions = {image: caption for image in training if (caption := caption_of(questions[image]))}
    write_jsonl(out / "captions.jsonl", ({"image": f"{i}.png", "caption": caption} for i, caption in captions.items()))
    rows, texts = [], []
    for _ in range(PASSES):
        for image in training:
            dealt = rng.sample(questions[image], len(questions[image]))
            for start in range(0, len(dealt), QUESTIONS_PER_ROW):
                some = dealt[start : start + QUESTIONS_PER_ROW]
                rows.append(conversation(some, {"type": "image", "image": f"{image}.png"}))
                if image in captions:
                    texts.append(conversation(some, {"type": "text", "text": f"{captions[image]}. "}))
    rng.shuffle(rows)
    write_jsonl(out / "chat.jsonl", rows)
    write_jsonl(out / "text.jsonl", texts)
    asked = [
        {"id": f"{image}-{number}", "image": f"{image}.png", "question": q, "answer": a, "kind": kind_of(a)}
        for image in heldout
        for number, (q, a) in enumerate(questions[image])
    ]
    write_jsonl(out / "heldout.jsonl", asked)


def caption_of(questions: Iterable[Question]) -> str | None:
    """What the questions of an image give away about it, if that is both its colour and its shape."""
    shape = colour = None
    for question, answer in questions:
        words = set(re.findall(r"[a-z]+", question))
        negated = bool(words & {"not", "no"})
        if answer in SHAPES:
            shape = answer
        elif answer in COLOURS:
            colour = answer
        elif (answer == "yes") != negated:
            shape = next((word for word in SHAPES if word in words), shape)
            colour = next((word for word in COLOURS if word in words), colour)
        if answer not in ("yes", "no"):
            shape = next((word for word in SHAPES if word in words), shape)
            colour = next((word for word in COLOURS if word in words), colour)
    return f"a {colour} {shape}" if colour and shape else None


def kind_of(answer: str) -> str:
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes/no"


def run_one(recipe: str, tower: str, data: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains one recipe and answers the held-out questions with the right and with another picture."""
    folder = out / f"{recipe}-{tower}"
    learning = ["stages.chat.learning_rates.vision_tower=5e-4"] if tower == "learning" else []
    began = time.perf_counter()
    config = str(ROOT / "configs" / "easy_vqa" / f"{recipe}.yaml")
    vlm("train", config, f"data_root={data}", *learning, *overrides, "--out", str(folder))
    seconds = time.perf_counter() - began
    figures: dict[str, Any] = {"recipe": recipe, "tower": tower, "training_seconds": round(seconds)}
    for control in ("none", "shuffled"):
        target = folder / f"eval-{control}"
        asked = ["--task", "exact", "--data", str(data / "heldout.jsonl"), "--control", control, "--out", str(target)]
        vlm("eval", str(folder / "model"), *asked)
        figures |= {f"{control}/{name}": value for name, value in metrics(target).items()}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/easy_vqa"))
    parser.add_argument("--recipe", nargs="+", choices=("early", "deep"), default=["early", "deep"])
    parser.add_argument("--tower", nargs="+", choices=("frozen", "learning"), default=["frozen", "learning"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipes'")
    options = parser.parse_intermixed_args()
    prepare(options.data, options.out / "data", options.seed)
    for recipe in options.recipe:
        for tower in options.tower:
            print(json.dumps(run_one(recipe, tower, options.out / "data", options.out, options.overrides)), flush=True)


if __name__ == "__main__":
    main()
