"""What the engine remembers: keys and values of running rows, and images that were encoded before."""

from collections import OrderedDict
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from vlm import Visual
from vlm.configuration import context_length
from vlm.errors import UserError

FIRST_LENGTH = 256


class Span:
    """What the next forward of the LM writes and reads; one for all layers of a `SlotCache`.

    Prefill: rows first .. first + B, from position 0. Decode (`positions` [B] set): rows 0 .. B, one token each at its
    own position, attending to the first `width` positions.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.first = 0
        self.positions: torch.Tensor | None = None
        self.indices: torch.Tensor | None = None
        self.width = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values [rows, H, length, D] of one layer, allocated by the first forward."""

    is_sliding = False

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span = span
        self.stores: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # zeros, since a masked score times a NaN of uninitialised memory would still be NaN
        self.stores = [
            part.new_zeros(self.span.rows, part.shape[1], self.span.length, part.shape[3])
            for part in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        span, (keys, values) = self.span, self.stores
        batch, _, tokens, _ = key_states.shape
        if span.positions is None:
            keys[span.first : span.first + batch, :, :tokens] = key_states
            values[span.first : span.first + batch, :, :tokens] = value_states
            return key_states, value_states
        keys[span.indices, :, span.positions] = key_states[:, :, 0]
        values[span.indices, :, span.positions] = value_states[:, :, 0]
        return keys[:batch, :, : span.width], values[:batch, :, : span.width]

    def resize(self, rows: int, length: int) -> None:
        """Brings the storage to another size, keeping what fits."""
        for number, old in enumerate(self.stores):
            if (old.shape[0], old.shape[2]) == (rows, length):
                continue
            new = old.new_zeros(rows, old.shape[1], length, old.shape[3])
            kept = (slice(min(rows, old.shape[0])), slice(None), slice(min(length, old.shape[2])))
            new[kept] = old[kept]
            self.stores[number] = new

    def get_seq_length(self) -> int:
        return 0 if self.span.positions is None else self.span.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A cache whose rows have lengths of their own and come and go between steps; it grows by doubling."""

    def __init__(self, num_layers: int, max_rows: int, max_length: int) -> None:
        self.max_rows, self.max_length = max_rows, max_length
        self.span = Span(min(max_rows, 4), min(max_length, FIRST_LENGTH))
        self.slots = [SlotLayer(self.span) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))

    def begin_prefill(self, first: int, rows: int, length: int) -> None:
        """The next forward reads prompts, padded on the right to `length`, into rows first .. first + rows."""
        self.reserve(first + rows, length)
        self.span.first, self.span.positions = first, None

    def begin_decode(self, positions: list[int], device: torch.device) -> torch.Tensor:
        """The next forward adds one token to each of the first rows; returns their positions [B]."""
        width = max(positions) + 1
        self.reserve(len(positions), width)
        self.span.width = width
        self.span.positions = torch.tensor(positions, device=device)
        self.span.indices = torch.arange(len(positions), device=device)
        return self.span.positions

    def reserve(self, rows: int, length: int) -> None:
        assert rows <= self.max_rows, rows
        assert length <= self.max_length, length
        span = self.span
        if rows <= span.rows and length <= span.length:
            return
        size = (
            span.rows if rows <= span.rows else min(self.max_rows, max(rows, 2 * span.rows)),
            span.length if length <= span.length else min(self.max_length, max(length, 2 * span.length)),
        )
        try:
            for layer in self.slots:
                layer.resize(*size)
        except Exception:  # whatever it was (torch has several for no memory): it is raised again, in the old size
            for layer in self.slots:
                layer.resize(span.rows, span.length)
            raise
        span.rows, span.length = size

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.reserve(target + 1, length)
        for layer in self.slots:
            for store in layer.stores:
                store[target, :, :length] = store[source, :, :length]

    def clear_rows(self, first: int, rows: int) -> None:
        """Wipes what a failed request may have left: a NaN would reach the row's next owner through the mask."""
        for layer in self.slots:
            for store in layer.stores:
                store[first : first + rows] = 0


class ImageCache:
    """The most recently used images as the language model sees them, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, Visual] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Visual | None:
        visual = self._entries.get(key)
        if visual is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return visual

    def put(self, key: str, visual: Visual) -> None:
        if key in self._entries:
            self.bytes -= size_of(self._entries.pop(key))
        self._entries[key] = visual
        self.bytes += size_of(visual)
        while self.bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= size_of(oldest)


def size_of(visual: Visual) -> int:
    """Bytes of a Visual with its ready keys and values."""
    tensors = [visual.tokens, *(part for pair in visual.layers for part in pair)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_cacheable(text_config: Any) -> None:
    """UserError for language models that remember anything but keys and values of all earlier tokens."""
    window = getattr(text_config, "sliding_window", None)
    sliding = window is not None and getattr(text_config, "use_sliding_window", True)
    default = ["sliding_attention" if sliding else "full_attention"]
    kinds = set(getattr(text_config, "layer_types", None) or default) - {"full_attention"}
    longest = context_length(text_config)
    if kinds == {"sliding_attention"} and window is not None and longest is not None and window >= longest:
        return  # a window as long as the context never slides
    if kinds:
        raise UserError(
            f"the torch engine serves language models with full attention only; this {text_config.model_type} model "
            f"has layers of the kind {', '.join(sorted(kinds))}"
        )
