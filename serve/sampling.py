"""From logits to tokens: the one place for penalties, biases, temperature, truncation, seeds and log-probabilities."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serve.engine import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Choice:
    """A row's next token; `finite` is False where the model gave no usable numbers."""

    token_id: int
    finite: bool
    logprob: TokenLogprob | None = None


class Sampler:
    """The state of one row: its random numbers and what it has said so far.

    Every row draws from a generator of its own, so a seed gives the same text whatever else is in the batch. `copy`
    numbers the choices of a request (n > 1).
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, copy: int, device: torch.device):
        self.params = params
        self.random: random.Random | None = None
        if not params.greedy:
            # seeded by text: seeds that differ by sign or in high bits only are different seeds, too
            self.random = random.Random(None if params.seed is None else f"{params.seed}/{copy}")
        self.counts: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
        if params.logit_bias:
            self.bias = torch.zeros(vocab_size, device=device)
            tokens = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
            self.bias[tokens] = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)

    @property
    def adjusts(self) -> bool:
        return self.counts is not None or self.seen is not None or self.bias is not None

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Penalties and biases on one row's logits [V]."""
        params = self.params
        if self.seen is not None:
            penalty = params.repetition_penalty
            punished = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, punished, logits)
        if self.counts is not None:
            logits = logits - params.frequency_penalty * self.counts - params.presence_penalty * (self.counts > 0)
        return logits if self.bias is None else logits + self.bias

    def observe(self, token_id: int) -> None:
        """Takes note of a token that was generated."""
        if self.counts is not None:
            self.counts[token_id] += 1
        if self.seen is not None:
            self.seen[token_id] = True


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of every row. logits: [B, V] of any float type; greedy rows get exactly the argmax."""
    logits = logits.float()
    adjusted = logits
    if any(sampler.adjusts for sampler in samplers):
        rows = [sampler.adjust(row) for sampler, row in zip(samplers, logits, strict=True)]
        adjusted = torch.stack(rows)
    best, tokens = adjusted.max(-1)  # a NaN anywhere in a row becomes its maximum
    finite = best.isfinite().tolist()
    drawing = [i for i, sampler in enumerate(samplers) if sampler.random is not None and finite[i]]
    if drawing:
        tokens[drawing] = _draw(adjusted[drawing], [samplers[i] for i in drawing]).to(tokens.device)
    token_ids: list[int] = tokens.tolist()
    logprobs: dict[int, TokenLogprob] = {}
    asking = [i for i, sampler in enumerate(samplers) if sampler.params.logprobs and finite[i]]
    if asking:
        logprobs = dict(
            zip(asking, _logprobs(logits[asking], tokens[asking], [samplers[i] for i in asking]), strict=True)
        )
    return [Choice(token_ids[i], finite[i], logprobs.get(i)) for i in range(len(samplers))]


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """One token per row [R], by inverting the cumulative distribution at the row's own random number."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    params = [sampler.params for sampler in samplers]
    # the maximum is taken off first, so that tiny temperatures can't overflow
    scaled = (logits - logits.amax(-1, keepdim=True)) / column([p.temperature for p in params]).float()
    vocab_size = logits.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    if min(top_k) < vocab_size:
        largest = scaled.topk(max(k for k in top_k if k < vocab_size), dim=-1).values
        for row, k in enumerate(top_k):
            if k < vocab_size:
                scaled[row].masked_fill_(scaled[row] < largest[row, k - 1], -torch.inf)
    probabilities = scaled.double().softmax(-1)
    if any(p.top_p < 1.0 for p in params):
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= column([p.top_p for p in params])
        beyond[:, 0] = False  # the likeliest token always stays
        probabilities = probabilities.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    if any(p.min_p > 0.0 for p in params):
        floor = column([p.min_p for p in params]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    cumulative = probabilities.cumsum(-1)
    # 32 bits keep the product below the total in float64, so that a token with a chance is found
    numbers = column([sampler.random.getrandbits(32) / 2**32 for sampler in samplers if sampler.random is not None])
    points = numbers * cumulative[:, -1:]
    # a token beyond the vocabulary would fail the next step of the whole batch
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=vocab_size - 1)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, samplers: Sequence[Sampler]) -> list[TokenLogprob]:
    logprobs = logits.log_softmax(-1)
    own: list[float] = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    most = min(max(sampler.params.top_logprobs for sampler in samplers), logits.shape[-1])
    values, indices = (part.tolist() for part in logprobs.topk(most, dim=-1))
    return [
        TokenLogprob(token, own[i], tuple(zip(indices[i], values[i], strict=True))[: samplers[i].params.top_logprobs])
        for i, token in enumerate(tokens.tolist())
    ]
