"""A question about a picture and what the model said to it when it was saved, by which a server knows it again."""

import base64
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.configuration import context_length
from vlm.errors import UserError, first_line
from vlm.processing import VisionLanguageProcessor
from vlm.settings import parse

FILE = "self_test.json"
VERSION = 1
TEXT = "What is in the picture?"
SIZE, BLOCKS = (96, 64), (6, 4)  # wider than high, so that turning and cropping show
STEPS, BEST = 4, 10
URL = "data:image/png;base64,"

# How far apart answers may be in one number format and another (see `distance`). Against float32, bfloat16 is up to
# 0.03 away, float16 0.005, 8-bit weights 0.06 and 4-bit ones, rounded to the nearest, 0.8: the demo's models and tiny
# random ones of every kind. The room above is for larger models (none was measured), other kernels, and two roundings
# instead of one. Without
# its picture the demo's deep model is 1.7 to 2.6 away.
BOUNDS = {"float64": 0.02, "float32": 0.02, "float16": 0.3, "bfloat16": 0.3}
QUANTISED = 1.5

Step = tuple[tuple[int, float], ...]
Pixels = Callable[[Sequence[Image.Image]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class SelfTest:
    """What is asked, and what a model said in the number format `dtype`.

    steps: for each token of the greedy answer the likeliest tokens and their log-probabilities, the answer's own first;
    picture_matters: how far from this the answer to another picture is (`distance`).
    """

    text: str
    picture: str
    prompt_tokens: int
    dtype: str
    steps: tuple[Step, ...]
    picture_matters: float
    version: int = VERSION


@dataclass(frozen=True)
class Answer:
    """What a server said: for each token the token and the log-probabilities of the likeliest."""

    prompt_tokens: int
    steps: tuple[tuple[int, dict[int, float]], ...]


def write(model: Any, processor: VisionLanguageProcessor, folder: Path, pixels: Pixels | None = None) -> None:
    """Asks the model as it is, on its device, and puts the file into its folder.

    The model is one process's own: nothing here waits for others. pixels: how the model takes images, if not as the
    processor makes them. Where there can be no test, that is printed.
    """
    try:
        made = make(model, processor, pixels or processor.pixels)
    except Exception as error:  # a model that was trained for days is saved whatever happens here
        print(f"no {FILE} is written, so a server can't check this model: {first_line(error)}", file=sys.stderr)
        return
    (folder / FILE).write_text(json.dumps(asdict(made)) + "\n", encoding="utf-8")


def read(folder: Path) -> SelfTest | None:
    """The test in a model's folder, if there is one. UserError when it is of another version, or broken."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if isinstance(found, dict) and found.get("version") != VERSION:
        raise UserError(f"{path}: of version {found.get('version')}, and this release of vlm knows version {VERSION}")
    return parse(SelfTest, found, str(path))


def check(test: SelfTest, answer: Answer, dtype: str, quantised: bool) -> str:
    """A line that says how well a server's answer agrees. UserError when it doesn't.

    dtype: the server's number format; quantised: its weights or its cache are coarser than that.
    """
    if answer.prompt_tokens != test.prompt_tokens:
        raise UserError(
            f"the model is asked in another way than when it was saved: its test question takes {answer.prompt_tokens} "
            f"tokens instead of {test.prompt_tokens}"
        )
    bound = QUANTISED if quantised else max(BOUNDS.get(name, QUANTISED) for name in (dtype, test.dtype))
    apart = distance(test.steps, answer.steps)
    if not apart <= bound:  # a NaN is no agreement
        raise UserError(
            "the model answers its test question differently from when it was saved: log-probabilities are "
            f"{apart:.3g} apart, and rounding makes up to {bound:g}"
        )
    told = f"answers as when it was saved: log-probabilities are {apart:.2g} apart (up to {bound:g} is rounding"
    if test.picture_matters > bound:
        return f"{told}; another picture makes {test.picture_matters:.2g})"
    return f"{told}); whether it sees pictures can't be told, as they hardly change what this model says"


def make(model: Any, processor: VisionLanguageProcessor, pixels: Pixels) -> SelfTest:
    """UserError where the model can't be asked."""
    picture, other = (_draw(seed) for seed in (0, 1))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}]
    ids = processor.chat.encode(chat, processor.placeholders([picture]), add_generation_prompt=True).input_ids
    context = context_length(model.config.text_config)
    if context is not None and len(ids) + STEPS > context:
        raise UserError(f"a picture and a question take {len(ids)} tokens of a context of {context}")
    was_training = model.training
    model.eval()
    try:
        answer, logprobs = _generate(model, processor, ids, pixels([picture]))
        steps = tuple(_best(row, token) for row, token in zip(logprobs, answer, strict=True))
        if not all(math.isfinite(value) for step in steps for _, value in step):
            raise UserError("its log-probabilities are no numbers")
        otherwise = _forced(model, ids, answer, pixels([other]))
    finally:
        model.train(was_training)
    rows = [(token, dict(enumerate(row.tolist()))) for token, row in zip(answer, otherwise, strict=True)]
    shown = URL + base64.b64encode(_png(picture)).decode()
    dtype = str(model.dtype).removeprefix("torch.")
    return SelfTest(TEXT, shown, len(ids), dtype, steps, round(distance(steps, rows), 4))


def distance(expected: Sequence[Step], got: Sequence[tuple[int, dict[int, float]]]) -> float:
    """Root mean square of the differences of log-probabilities, up to where the answers part.

    A token that isn't among the likeliest of what was got counts as the least likely of them.
    """
    squares = []
    for best, (token, known) in zip(expected, got, strict=False):
        least = min(known.values())
        for one, value in best:
            squares.append((value - known[one]) ** 2 if one in known else max(0.0, value - least) ** 2)
        if best[0][0] != token:
            break
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf


@torch.no_grad()
def _generate(
    model: Any, processor: VisionLanguageProcessor, ids: list[int], pixels: dict[str, torch.Tensor]
) -> tuple[list[int], torch.Tensor]:
    """The greedy answer, and the log-probabilities [T, V] before each of its tokens."""
    input_ids = torch.tensor([ids], device=model.device)
    out = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{name: tensor.to(model.device) for name, tensor in pixels.items()},
        max_new_tokens=STEPS,
        do_sample=False,
        use_cache=True,
        pad_token_id=processor.tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float().log_softmax(-1).cpu()


@torch.no_grad()
def _forced(model: Any, ids: list[int], answer: list[int], pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities [T, V] before each token of an answer, whatever the model would say."""
    input_ids = torch.tensor([[*ids, *answer[:-1]]], device=model.device)
    given = {name: tensor.to(model.device) for name, tensor in pixels.items()}
    logits = model(input_ids=input_ids, **given, logits_to_keep=len(answer)).logits
    return logits[0].float().log_softmax(-1).cpu()


def _best(logprobs: torch.Tensor, token: int) -> Step:
    values, ids = logprobs.topk(min(BEST, len(logprobs)))
    pairs = [(int(i), round(float(value), 6)) for i, value in zip(ids, values, strict=True)]
    return tuple(sorted(pairs, key=lambda pair: pair[0] != token))


def _draw(seed: int) -> Image.Image:
    columns, rows = BLOCKS
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(SIZE, Image.Resampling.NEAREST)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
