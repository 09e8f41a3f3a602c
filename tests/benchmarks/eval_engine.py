"""What an evaluation costs beside its engine: `vlm eval` through the torch engine, and generate alone.

    python tests/benchmarks/eval_engine.py [--questions 512] [--rounds 3] [--threads 1]

A random LLaVA over photographs of COCO's size; every answer has 16 tokens. "engine" is `generate` over batches whose
ids and pixels are there already; "eval" everything that stands around it: decoding pictures, chats to ids, the journal
of answers, the running score. Both in one process, one after the other in each round; loading is not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from data_files import write_photographs
from support import ROOT

from tests.conftest import CONTEXT, TEXTS
from train.evaluation.journal import Journal
from train.evaluation.local import LocalModel
from train.evaluation.run import ask
from train.evaluation.tasks import Means, Question, make_tasks
from vlm import VisionLanguageConfig, VisionLanguageModel, load, save
from vlm.processing import make_processor
from vlm.tokenization import IMAGE_TOKEN, train_tokenizer

TOKENS = 16
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


def measure(model: LocalModel, folder: Path, question: Question) -> tuple[float, float]:
    """Questions a second: of the evaluation, and of generate alone."""
    (task,) = make_tasks(question, folder, controls=False)
    batches = task.batches(Means())
    Journal(folder).claim(task.settings)
    began = time.perf_counter()
    ask(task, batches, Journal(folder), {}, model)
    evaluated = time.perf_counter() - began
    ready = [model.prepare(batch) for batch in batches]
    began = time.perf_counter()
    for batch in ready:
        model._generate(batch)
    return len(task.items) / evaluated, len(task.items) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model")
        data = write_photographs(folder / "data", options.questions)
        model = LocalModel(*load(folder / "model"), max_tokens=TOKENS)
        rounds = []
        for number in range(options.rounds):
            asked = Question(str(folder / "model"), "exact", data, batch_size=options.batch_size)
            rounds.append(measure(model, folder / str(number), asked))
            print(json.dumps({"round": number, "eval": rounds[-1][0], "engine": rounds[-1][1]}))
    ratios = [evaluated / engine for evaluated, engine in rounds]
    evaluated, engine = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"eval {evaluated:.1f} questions/s, generate alone {engine:.1f}: median ratio {statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    assert ROOT.is_dir()
    main()
