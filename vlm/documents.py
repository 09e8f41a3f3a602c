"""Several documents in one row of a batch: attention that never crosses from one to another.

Positions restart at 0 with each document. On CUDA transformers' own varlen FlashAttention or FlexAttention read the
documents off these positions; on the CPU a causal attention per document wastes nothing, where a dense mask would cost
as much as all documents together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from vlm.errors import UserError

NAME = "documents"
Span = tuple[int, int, int]  # row, first token, one behind the last
PROBE = (5, 3)  # tokens of the documents that a model is tried with
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def attend_within_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Sequence[Span] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of every document to itself, as transformers' `AttentionInterface` calls it.

    query: [B, H, T, D]; key, value: [B, Hkv, T, D]; documents cover every token, in order. Returns [B, T, H, D].
    """
    if documents is None:
        raise ValueError(f"{type(module).__name__} isn't told where documents begin: its layers hand no arguments on")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces = []
    for row, start, end in documents:
        # a window as long as the document shuts nothing out
        far = sliding_window is not None and end - start > sliding_window
        piece = nn.functional.scaled_dot_product_attention(
            query[row : row + 1, :, start:end],
            key[row : row + 1, :, start:end],
            value[row : row + 1, :, start:end],
            attn_mask=_band(end - start, sliding_window or 0, query.device) if far else None,
            dropout_p=dropout,
            is_causal=not far,
            scale=scaling,
        )
        pieces.append(piece[0].transpose(0, 1))  # [T of the document, H, D]
    return torch.cat(pieces).view(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[T, T]: each token sees itself and the window - 1 before it."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None]
    return (behind >= 0) & (behind < window)


@contextmanager
def packed_attention(
    language_model: PreTrainedModel, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """While it's open the model keeps documents of a row apart; UserError for one that can't.

    It's shown on the model itself: two documents in a row get the logits that each gets alone. autocast: what the model
    will run under.
    """
    usual = language_model.config._attn_implementation
    with torch.no_grad(), autocast():
        alone = _probe(language_model, packed=False)
        half = alone.dtype in (torch.bfloat16, torch.float16)
        language_model.set_attn_implementation(_implementation(language_model, half))
    try:
        with torch.no_grad(), autocast():
            together = _probe(language_model, packed=True)
        apart = float((together - alone).abs().max() / alone.abs().max().clamp_min(1e-6))
        if not apart <= TOLERANCE[alone.dtype]:
            raise UserError(
                f"{type(language_model).__name__}: documents in one row change each other (by {apart:.1g}), so rows "
                "can't be packed for it; use packing.mode: bucket"
            )
        yield
    finally:
        language_model.set_attn_implementation(usual)


def _implementation(language_model: PreTrainedModel, half: bool) -> str:
    if language_model.device.type != "cuda":
        return NAME if language_model._supports_attention_backend else "sdpa"
    return "flash_attention_2" if half and is_flash_attn_2_available() else "flex_attention"


def _probe(language_model: PreTrainedModel, packed: bool) -> torch.Tensor:
    """Logits [T, V] of two short documents, in one row or one after the other."""
    device = language_model.device
    size = language_model.get_input_embeddings().weight.shape[0]
    ids = [torch.arange(1, 1 + length, device=device) * (size // 7) % size for length in PROBE]
    learning = language_model.training
    language_model.eval()
    try:
        if not packed:
            return torch.cat([language_model(input_ids=part[None], use_cache=False).logits[0] for part in ids])
        out = language_model(
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat([torch.arange(length, device=device) for length in PROBE])[None],
            documents=[(0, 0, PROBE[0]), (0, PROBE[0], sum(PROBE))],
            use_cache=False,
        )
        logits: torch.Tensor = out.logits[0]
        return logits
    finally:
        language_model.train(learning)


AttentionInterface.register(NAME, attend_within_documents)
