"""A piece of eval.py: `python tests/benchmarks/eval_engine.py QUESTIONS` tells how many questions a second an
evaluation answers, and `generate` alone.

A random LLaVA over photographs of COCO's size, torch on one thread; every answer has 16 tokens. "engine" is `generate`
over batches whose ids and pixels are there already, the faster of once before and once after; "eval" is all that stands
around it, too: decoding pictures, chats to ids, the journal of answers, the running score. Loading is not counted.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import support  # noqa: F401 (puts the repository on the path)
import torch
from data_files import write_photographs

from tests.conftest import CONTEXT, TEXTS
from train.evaluation.journal import Journal
from train.evaluation.local import LocalModel
from train.evaluation.run import ask
from train.evaluation.tasks import Means, Question, make_tasks
from vlm import VisionLanguageConfig, VisionLanguageModel, load, save
from vlm.processing import make_processor
from vlm.tokenization import IMAGE_TOKEN, train_tokenizer

TOKENS, BATCH = 16, 32
VISION = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
VISION |= {"num_attention_heads": 4, "image_size": 224, "patch_size": 16}
TEXT = {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
TEXT |= {"num_attention_heads": 6, "num_key_value_heads": 6}


def build(folder: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=320, context=CONTEXT)
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "eos_token_id": None}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = VisionLanguageConfig(image_token_id=image_token, vision_config=VISION, text_config=text)
    torch.manual_seed(0)
    save(VisionLanguageModel(config), make_processor(config, tokenizer), folder)


def measure(questions: int) -> dict[str, float]:
    """Questions a second: of the evaluation, and of generate alone."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model")
        data = write_photographs(folder / "data", questions)
        model = LocalModel(*load(folder / "model"), max_tokens=TOKENS)
        (task,) = make_tasks(Question(str(folder / "model"), "exact", data, batch_size=BATCH), folder / "out", False)
        batches = task.batches(Means())
        journal = Journal(task.folder)
        journal.claim(task.settings)
        next(model.replies(batches[:1]))  # what is slow the first time
        ready = [model.prepare(batch) for batch in batches]
        before = questions / generate(model, ready)
        began = time.perf_counter()
        ask(task, batches, journal, {}, model)
        evaluated = questions / (time.perf_counter() - began)
        alone = max(before, questions / generate(model, ready))
    return {"questions": questions, "eval": evaluated, "engine": alone, "ratio": evaluated / alone}


def generate(model: LocalModel, ready: Sequence[Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    for batch in ready:
        model._generate(batch)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
