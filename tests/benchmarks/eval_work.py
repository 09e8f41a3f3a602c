"""What tests/benchmarks/eval.py measures, each piece in a process of its own: python eval_work.py NAME '{"path": ...}'

The last line of the output is an object of figures. Seconds of both sides are of one process, one after the other.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from support import ROOT

Figures = dict[str, Any]
SEED = 7


def official_script() -> Any:
    """The port of the official loop that the tests compare with, too."""
    sys.path.append(str(ROOT / "tests" / "data" / "benchmarks"))
    from official_vqa import Script

    return Script


class Words:
    """Words as often as in a language (Zipf)."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self.rng = rng
        self.words = [f"{''.join(rng.choices('bcdfghklmnprstvw', k=rng.randint(2, 7)))}{n % 10}" for n in range(count)]
        self.weights = list(accumulate(1 / rank for rank in range(1, count + 1)))

    def some(self, count: int) -> list[str]:
        return self.rng.choices(self.words, cum_weights=self.weights, k=count)


def write_vqa(annotations: str, predictions: str, count: int) -> Figures:
    """As VQAv2 val: 38 % yes or no, 12 % numbers; ten equal answers in about two questions of five."""
    rng = random.Random(SEED)
    words = Words(20_000, rng)
    kinds = {"yes/no": (["is the", "are there"], 0.6), "number": (["how many"], 0.45)}
    rows, said = [], []
    for number in range(count):
        kind = rng.choices(["yes/no", "number", "other"], [38, 12, 50])[0]
        begins, agreed = kinds.get(kind, (["what is the", "where", "what color is the"], 0.25))
        right = {"yes/no": rng.choice(["yes", "no"]), "number": str(rng.randint(0, 9))}.get(kind) or words.some(1)[0]
        other = [" ".join(words.some(rng.choice([1, 1, 2, 3]))) for _ in range(3)]
        answers = [right] * 10 if rng.random() < agreed else rng.choices([right, *other], [70, 15, 10, 5], k=10)
        told = [
            {"answer": answer, "answer_confidence": rng.choice(["yes", "maybe", "no"]), "answer_id": n}
            for n, answer in enumerate(answers, 1)
        ]
        question = {"question_id": number * 1000, "image_id": number // 5, "multiple_choice_answer": right}
        rows.append({**question, "question_type": rng.choice(begins), "answer_type": kind, "answers": told})
        said.append({"question_id": number * 1000, "answer": rng.choices([right, *other], [60, 20, 10, 10])[0]})
    Path(annotations).write_text(json.dumps({"info": {}, "license": {}, "annotations": rows}), encoding="utf-8")
    Path(predictions).write_text(json.dumps(said), encoding="utf-8")
    return {}


def write_captions(path: str, count: int) -> Figures:
    """Tokenised captions, [said, five references] of each image, which share words as descriptions of one thing do."""
    rng = random.Random(SEED)
    words = Words(10_000, rng)
    rows = []
    for _ in range(count):
        shown = words.some(14)
        texts = []
        for _ in range(6):
            begin = rng.randint(0, 4)
            own = [rng.choice(shown) if rng.random() < 0.3 else word for word in shown[begin : begin + 10]]
            texts.append(" ".join(word if rng.random() < 0.7 else words.some(1)[0] for word in own))
        rows.append([texts[0], texts[1:]])
    Path(path).write_text(json.dumps(rows), encoding="utf-8")
    return {}


def score_vqa(annotations: str, predictions: str) -> Figures:
    """Both sides from what they have read to a score for each question and each type."""
    from data.benchmarks.vqa import VQA

    given = VQA().matched(Path(predictions), Path(annotations))
    began = time.perf_counter()
    scores = VQA().score(given.items, given.answers)
    metrics = scores.metrics
    ours = time.perf_counter() - began
    script = read_official(annotations, predictions)
    began = time.perf_counter()
    script.evaluate()
    port = time.perf_counter() - began
    same = {str(number): value for number, value in script.questions.items()} == scores.per_item
    if not same or round(metrics["accuracy"], 2) != script.accuracy["overall"]:
        raise SystemExit("the scores differ")
    return {"questions": scores.n, "ours": ours, "port": port, "ratio": port / ours}


def official_command(annotations: str, predictions: str) -> Figures:
    script = read_official(annotations, predictions)
    script.evaluate()
    return dict(script.accuracy)


def read_official(annotations: str, predictions: str) -> Any:
    rows = json.loads(Path(annotations).read_text(encoding="utf-8"))["annotations"]
    return official_script()(rows, json.loads(Path(predictions).read_text(encoding="utf-8")))


def score_captions(path: str) -> Figures:
    """Both sides from tokenised texts to BLEU, ROUGE-L and CIDEr-D."""
    import numpy as np
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    from data.benchmarks.captions import measure

    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    hypotheses: Sequence[str] = [said for said, _ in rows]
    references: Sequence[Sequence[str]] = [others for _, others in rows]
    began = time.perf_counter()
    measures, ciders = measure(hypotheses, references)
    told = {name: float(measure) for name, measure in measures.items()}
    ours = time.perf_counter() - began
    truth = {number: list(others) for number, others in enumerate(references)}
    said = {number: [text] for number, text in enumerate(hypotheses)}
    began = time.perf_counter()
    bleus, _ = Bleu(4).compute_score(truth, said, verbose=0)
    cider, each = Cider().compute_score(truth, said)
    rouge, _ = Rouge().compute_score(truth, said)
    theirs = time.perf_counter() - began
    expected = {f"bleu{n}": value for n, value in enumerate(bleus, 1)} | {"rouge_l": rouge, "cider": cider}
    apart = max(abs(told[name] - value) for name, value in expected.items())
    apart = max(apart, float(np.abs(np.array(each) - ciders).max()))
    return {"images": len(rows), "ours": ours, "theirs": theirs, "ratio": theirs / ours, "apart": apart}


WORK: dict[str, Callable[..., Figures]] = {
    work.__name__: work for work in (write_vqa, write_captions, score_vqa, official_command, score_captions)
}


if __name__ == "__main__":
    print(json.dumps(WORK[sys.argv[1]](**json.loads(sys.argv[2]))))
