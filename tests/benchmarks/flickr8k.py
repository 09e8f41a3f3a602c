"""Flickr8k from nothing: yes/no questions over photo-disjoint folds, and captions, through the command line.

    python tests/benchmarks/flickr8k.py DATA --out runs/flickr8k [--folds 5] [--recipe early deep captions]

DATA holds images/, captions.jsonl ({"image", "captions"}) and yesno.jsonl ({"image", "question", "answer", "object"}).
Encoder, language model and fusion are trained on the photographs outside of a fold; a ridge regression on pixels,
histograms of oriented gradients and colours answers the same questions. Captions are made for the first fold. Needs the
extra `bench`.
"""

import argparse
import json
import math
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import t as student
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support import ROOT, conversation, metrics, read_jsonl, vlm, vlm_side_by_side, write_jsonl

DESCRIBE = "Describe the image."
# The questions of yesno.jsonl, and a share of the like ones about what captions often name.
ASKED = {"dog": "a dog", "water": "water", "snow": "snow"}
MORE = {
    **{thing: f"a {thing}" for thing in ("man", "woman", "boy", "girl", "child", "ball", "bike", "street", "beach")},
    **{thing: f"a {thing}" for thing in ("rock", "car", "mountain", "field", "building", "wall", "hat")},
    "grass": "grass",
}
WORDS = {
    "dog": r"dogs?|pupp(?:y|ies)",
    "water": r"water|ocean|sea|lake|river|pool|waves?|surf\w*|swim\w*|splash\w*",
    "snow": r"snow\w*|ski\w*|sled\w*",
    "man": r"man|men|guys?",
    "woman": r"woman|women|lad(?:y|ies)",
    "child": r"child|children|kids?|boys?|girls?|toddlers?|bab(?:y|ies)",
    "bike": r"bikes?|bicycles?|bicyclists?|bikers?|motorcycles?|cyclists?",
    "grass": r"grass\w*|lawn",
    "beach": r"beach\w*|shore",
}
MORE_SHARE = 0.25
CLEAR = 4  # captions of five that must name a thing for a certain yes
PASSES = 6  # draws of negatives
SHUFFLES = 20
PARTS = (("vision", "clip"), ("language", "language"))
Captions = dict[str, list[str]]


def split(images: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    order = sorted(images)
    random.Random(seed).shuffle(order)
    return [order[fold::folds] for fold in range(folds)]


def mentions(thing: str, captions: Sequence[str]) -> int:
    pattern = re.compile(rf"\b(?:{WORDS.get(thing, thing + 's?')})\b")
    return sum(bool(pattern.search(caption.lower())) for caption in captions)


def question_of(thing: str) -> str:
    return f"Is there {({**ASKED, **MORE})[thing]} in the image?"


def ask(captions: Captions, rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Questions for photographs, as many yes as no about each thing: what captions name, and what none of them does."""
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for thing in (*ASKED, *MORE):
        counts = {image: mentions(thing, texts) for image, texts in captions.items()}
        least, share = (CLEAR, 1.0) if thing in ASKED else (2, MORE_SHARE)
        shown = [image for image, count in counts.items() if count >= least]
        absent = [image for image, count in counts.items() if count == 0]
        some = round(share * min(len(shown), len(absent)))
        for answer, images in (("yes", rng.sample(shown, some)), ("no", rng.sample(absent, some))):
            for image in images:
                asked[image].append((question_of(thing), answer))
    for questions in asked.values():
        rng.shuffle(questions)
    return asked


def prepare(data: Path, out: Path, heldout: set[str], captions: Captions, questions: list[dict[str, Any]]) -> None:
    """Writes what is trained on outside of the fold, and what is asked about it."""
    rng = random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "images").exists():
        (out / "images").symlink_to((data / "images").resolve())
    training = {image: texts for image, texts in captions.items() if image not in heldout}
    write_jsonl(out / "captions.jsonl", ({"image": image, "captions": texts} for image, texts in training.items()))
    described = [
        conversation([(DESCRIBE, clean(text))], {"type": "image", "image": image})
        for image, texts in training.items()
        for text in texts
    ]
    rng.shuffle(described)
    write_jsonl(out / "captions_chat.jsonl", described)
    chats, texts = [], []
    for _ in range(PASSES):
        for image, some in ask(training, rng).items():
            chats.append(conversation(some, {"type": "image", "image": image}))
            said = ". ".join(clean(text) for text in rng.sample(training[image], 2))
            told = [(DESCRIBE, clean(rng.choice(training[image]))), *some]
            texts.append(conversation(told, {"type": "text", "text": f"{said}. "}))
    rng.shuffle(chats)
    rng.shuffle(texts)
    write_jsonl(out / "chat.jsonl", chats)
    write_jsonl(out / "text.jsonl", texts)
    asked = [row for row in questions if row["image"] in heldout]
    write_jsonl(
        out / "heldout.jsonl",
        ({**row, "id": f"q{row['question_id']}", "kind": row["object"]} for row in asked),
    )
    write_jsonl(
        out / "heldout_captions.jsonl",
        (
            {"id": image, "image": image, "question": DESCRIBE, "answer": clean(captions[image][0])}
            for image in sorted(heldout)
        ),
    )


def clean(caption: str) -> str:
    """Lower case, words apart by one space, no full stop: what CIDEr's tokenizer makes of it, nearly."""
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", caption.lower()).split())


def config(name: str) -> str:
    return str(ROOT / "configs" / "flickr8k" / f"{name}.yaml")


def pretrain(data: Path, out: Path, seed: int) -> float:
    """Encoder and language model, side by side; the seconds this took."""
    began = time.perf_counter()
    common = [f"data_root={data}", f"seed={seed}", "threads=1"]
    vlm_side_by_side(
        *(["train", config(name), *common, "--out", str(out / name), "--resume"] for name in ("clip", "language"))
    )
    return time.perf_counter() - began


def train(recipe: str, data: Path, out: Path, seed: int, overrides: Sequence[str]) -> float:
    began = time.perf_counter()
    parts = [f"model.{part}.pretrained={out / name / 'model'}" for part, name in PARTS]
    vlm("train", config(recipe), f"data_root={data}", f"seed={seed}", *parts, *overrides, "--out", str(out / recipe))
    return time.perf_counter() - began


def answer_yes_no(model: Path, data: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for control in ("none", "shuffled"):
        target = model.parent / f"eval-{control}"
        asked = ["--task", "exact", "--data", str(data / "heldout.jsonl"), "--control", control, "--out", str(target)]
        vlm("eval", str(model), *asked)
        figures |= {f"{control}/{name}": value for name, value in metrics(target).items()}
    return figures


def describe(path: Path) -> np.ndarray:
    """Pixels 16 x 16, oriented gradients of 8 x 8 cells over 9 directions, and a 4 x 4 x 4 histogram of colours."""
    image = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float64) / 255
    small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float64).ravel() / 255
    rows, columns = np.gradient(pixels.mean(2))
    size, angle = np.hypot(rows, columns), np.mod(np.arctan2(rows, columns), np.pi)
    direction = np.minimum((angle / np.pi * 9).astype(int), 8)
    cells = np.zeros((8, 8, 9))
    np.add.at(cells, (np.arange(64)[:, None] // 8, np.arange(64)[None] // 8, direction), size)
    cells /= np.linalg.norm(cells, axis=2, keepdims=True) + 0.05
    bins = np.minimum((pixels * 4).astype(int), 3) @ (16, 4, 1)
    colours = np.bincount(bins.ravel(), minlength=64) / bins.size
    return np.concatenate([small, cells.ravel(), colours])


def ridge(data: Path, heldout: set[str], questions: list[dict[str, Any]]) -> float:
    """Right answers of a ridge regression for each object, its strength chosen on the training photographs."""
    features = {row["image"]: describe(data / "images" / row["image"]) for row in questions}
    hits = []
    for thing in ASKED:
        rows = [row for row in questions if row["object"] == thing]
        known = [row for row in rows if row["image"] not in heldout]
        asked = [row for row in rows if row["image"] in heldout]
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(1, 6, 11)))
        model.fit([features[row["image"]] for row in known], [row["answer"] for row in known])
        hits += list(model.predict([features[row["image"]] for row in asked]) == [row["answer"] for row in asked])
    return float(np.mean(hits))


def score_captions(model: Path, data: Path, captions: Captions, seed: int) -> dict[str, Any]:
    """CIDEr-D of the captions, of shuffles of them over the photographs, and of the best constant caption."""
    target = model.parent / "eval-captions"
    asked = ["--task", "exact", "--data", str(data / "heldout_captions.jsonl"), "--max-tokens", "40"]
    vlm("eval", str(model), *asked, "--out", str(target))
    said = {row["id"]: clean(row["answer"]) for row in read_jsonl(target / "predictions.jsonl")}
    references = {image: [clean(text) for text in captions[image]] for image in said}
    rng = random.Random(seed)
    shuffles = []
    for _ in range(SHUFFLES):
        texts = list(said.values())
        rng.shuffle(texts)
        shuffles.append(cider(references, dict(zip(said, texts, strict=True))))
    known = [clean(texts[0]) for image, texts in captions.items() if image not in said]
    constants = {text: cider(references, dict.fromkeys(said, text)) for text in rng.sample(known, 200)}
    common = sorted(set(said.values()), key=list(said.values()).count)[-20:]
    constants |= {text: cider(references, dict.fromkeys(said, text)) for text in common}
    best = max(constants, key=constants.__getitem__)
    return {
        "cider_d": round(cider(references, said), 4),
        "shuffled_mean": round(statistics.mean(shuffles), 4),
        "shuffled_largest": round(max(shuffles), 4),
        "constant": round(constants[best], 4),
        "constant_caption": best,
        "different_captions": len(set(said.values())),
        "samples": dict(list(said.items())[:8]),
    }


def cider(references: dict[str, list[str]], said: dict[str, str]) -> float:
    from pycocoevalcap.cider.cider import Cider  # of the extra "eval"; yes/no questions do without

    score, _ = Cider().compute_score(references, {image: [text] for image, text in said.items()})
    return float(score)


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval over folds (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1%}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1%} +- {half:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/flickr8k"))
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which of the five to run")
    recipes = ["early", "deep", "captions"]
    parser.add_argument("--recipe", nargs="+", choices=recipes, default=recipes)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the fusion recipes'")
    options = parser.parse_intermixed_args()
    captions: Captions = {row["image"]: row["captions"] for row in read_jsonl(options.data / "captions.jsonl")}
    questions = read_jsonl(options.data / "yesno.jsonl")
    folds = split(list(captions), 5, options.seed)
    found: dict[str, list[float]] = defaultdict(list)
    for fold in options.folds:
        heldout, out = set(folds[fold]), options.out / f"fold{fold}"
        data = out / "data"
        prepare(options.data, data, heldout, captions, questions)
        figures: dict[str, Any] = {"fold": fold, "ridge": round(ridge(options.data, heldout, questions), 4)}
        found["ridge"].append(figures["ridge"])
        figures["pretraining_seconds"] = round(pretrain(data, out, options.seed))
        for recipe in options.recipe:
            if recipe == "captions" and fold != options.folds[0]:
                continue
            seconds = round(train(recipe, data, out, options.seed, options.overrides))
            model = out / recipe / "model"
            if recipe == "captions":
                found_here = score_captions(model, data, captions, options.seed)
            else:
                found_here = answer_yes_no(model, data)
                found[recipe].append(found_here["none/accuracy"])
                found[f"{recipe}, shuffled"].append(found_here["shuffled/accuracy"])
            figures[recipe] = {"seconds": seconds, **found_here}
        kept = out / "figures.json"  # of recipes that were run before
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        kept.write_text(json.dumps({**known, **figures}, indent=1), encoding="utf-8")
        print(json.dumps(figures), flush=True)
    for name, values in found.items():
        print(f"{name}: {interval(values)}  {[round(value, 3) for value in values]}")


if __name__ == "__main__":
    main()
