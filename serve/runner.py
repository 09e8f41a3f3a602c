"""The model's side of the torch engine: images, prompts and single tokens in, logits out. No requests, no threads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from serve.cache import ImageCache, SlotCache, check_cacheable
from serve.engine import ImageInput
from vlm import VisionLanguageModel, Visual
from vlm.configuration import context_length
from vlm.errors import UserError, first_line
from vlm.fusion import MediaLayout

IMAGES_PER_CALL = 16


@dataclass(frozen=True)
class Prompt:
    """input_ids [T] and the images of its placeholders."""

    input_ids: Sequence[int]
    visuals: Sequence[Visual]


class ModelRunner:
    """Owns a model, its key-value rows and its image cache. To be used from one thread."""

    def __init__(self, model: VisionLanguageModel, max_rows: int, image_cache_bytes: int) -> None:
        text_config: Any = model.config.text_config
        length = context_length(text_config)
        if length is None:
            raise UserError(
                f"this {text_config.model_type} model names no longest context; put one into its config.json"
            )
        check_cacheable(text_config)
        self.model, self.config, self.device = model.eval(), model.config, model.device
        self.context_length = length
        self.vocab_size = int(text_config.vocab_size)
        self.rows = SlotCache(int(text_config.num_hidden_layers), max_rows, self.context_length)
        self.images = ImageCache(image_cache_bytes)
        self._pad_id = 0 if self.config.image_token_id != 0 else 1
        self._boolean_mask = model.language_model.config._attn_implementation != "eager"
        self._media: tuple[Visual, MediaLayout] | None = None

    @torch.inference_mode()
    def probe(self) -> None:
        """Reads and adds a token. UserError for language models that don't work with rows of keys and values."""
        try:
            self.prefill([Prompt([self._pad_id], [])], first=0)
            rows = min(2, self.rows.max_rows)
            self.decode([self._pad_id] * rows, [1, 0][:rows])
        except Exception as error:
            raise UserError(
                f"the torch engine can't serve this {self.config.text_config.model_type} model: {first_line(error)}"
            ) from error
        if not all(layer.is_initialized for layer in self.rows.slots):
            kind = self.config.text_config.model_type
            raise UserError(f"the torch engine can't serve this {kind} model: its layers don't keep keys and values")

    def encode(self, images: Sequence[ImageInput]) -> list[Visual]:
        """What the LM sees of each image, cached where it is known. ValueError for images that give no numbers."""
        visuals: dict[str, Visual] = {}
        missing: dict[str, ImageInput] = {}
        for image in images:
            known = visuals.get(image.key) or self.images.get(image.key)
            if known is None:
                missing[image.key] = image
            else:
                visuals[image.key] = known
        todo = list(missing.values())
        for begin in range(0, len(todo), IMAGES_PER_CALL):
            part = todo[begin : begin + IMAGES_PER_CALL]
            names = part[0].pixels
            encoded = self.model.encode_images(
                **{name: torch.cat([image.pixels[name] for image in part]).to(self.device) for name in names}
            )
            if not bool(encoded.tokens.isfinite().all()):
                raise ValueError("the vision tower gave non-finite features")
            if self.config.fusion == "deep":
                encoded = self.model.project_layers(encoded)
            for slot, image in enumerate(part, start=1):
                visuals[image.key] = encoded.select([slot])
                self.images.put(image.key, visuals[image.key])
        return [visuals[image.key] for image in images]

    def prefill(self, prompts: Sequence[Prompt], first: int) -> torch.Tensor:
        """Reads prompts into the rows from `first` on; returns the logits after each, [B, V]."""
        lengths = [len(prompt.input_ids) for prompt in prompts]
        longest = max(lengths)
        # padding on the right is out of sight of causal attention, so that no mask is needed
        padded = [[*prompt.input_ids, *[self._pad_id] * (longest - len(prompt.input_ids))] for prompt in prompts]
        input_ids = torch.tensor(padded, device=self.device)
        visuals = [visual for prompt in prompts for visual in prompt.visuals]
        ends = sorted(set(lengths))
        self.rows.begin_prefill(first, len(prompts), longest)
        output = self.model(
            input_ids=input_ids,
            position_ids=torch.arange(longest, device=self.device).expand_as(input_ids),
            past_key_values=self.rows,
            visual=Visual.concat(visuals) if visuals else None,
            use_cache=True,
            logits_to_keep=torch.tensor([end - 1 for end in ends], device=self.device),
        )
        logits: torch.Tensor = output.logits  # [B, len(ends), V]
        return logits[range(len(lengths)), [ends.index(length) for length in lengths]]

    def media_of(self, visuals: Sequence[Visual]) -> Visual | None:
        """What tokens after a prompt with these images go on seeing: nothing, in early fusion."""
        if self.config.fusion == "early" or not visuals:
            return None
        last_only = self.config.cross_attention_settings.attend == "last"
        return visuals[-1] if last_only else Visual.concat(visuals)

    def show(self, media: Sequence[Visual | None]) -> None:
        """What row 0, 1 ... sees in deep fusion; to be told again whenever the rows change."""
        self._media = _combine(media)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Adds a token to each of the first rows, at its position; returns the logits after it, [B, V]."""
        at = self.rows.begin_decode(list(positions), self.device)
        visual, layout = self._media or (None, None)
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            attention_mask=self._mask(at, max(positions) + 1) if min(positions) < max(positions) else None,
            position_ids=at[:, None],
            past_key_values=self.rows,
            visual=visual,
            media_layout=layout,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def score(self, prompt: Prompt, continuation: Sequence[int]) -> float:
        """Sum of the natural log-probabilities of a continuation."""
        output = self.model(
            input_ids=torch.tensor([[*prompt.input_ids, *continuation[:-1]]], device=self.device),
            visual=Visual.concat(prompt.visuals) if prompt.visuals else None,
            use_cache=False,
            logits_to_keep=len(continuation),
        )
        logprobs = output.logits[0].float().log_softmax(-1)  # [len(continuation), V]
        chosen = torch.tensor(list(continuation), device=self.device)[:, None]
        return float(logprobs.gather(1, chosen).sum())

    def _mask(self, positions: torch.Tensor, width: int) -> torch.Tensor:
        """[B, 1, 1, width]: each row sees its own tokens."""
        visible = (torch.arange(width, device=self.device) <= positions[:, None])[:, None, None]
        if self._boolean_mask:
            return visible
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(visible, dtype=self.model.dtype).masked_fill(~visible, lowest)


def _combine(media: Sequence[Visual | None]) -> tuple[Visual, MediaLayout] | None:
    """Media of several rows, each padded to the longest, so that a block reads its keys without gathering them."""
    first = next((visual for visual in media if visual is not None), None)
    if first is None:
        return None
    lengths = [0 if visual is None else sum(visual.lengths) for visual in media]
    width = max(lengths)

    def padded(layer: int, part: int) -> torch.Tensor:
        nothing = first.layers[layer][part][:0]
        rows = [nothing if visual is None else visual.layers[layer][part] for visual in media]
        return pad_sequence(rows, batch_first=True).flatten(0, 1)  # [B * width, H, Dh]

    visual = Visual(
        tokens=first.tokens.new_zeros(len(media) * width, 0),  # blocks with ready keys and values don't read them
        lengths=(width,) * len(media),
        layers=tuple((padded(layer, 0), padded(layer, 1)) for layer in range(len(first.layers))),
    )
    owned = torch.tensor(lengths, device=first.tokens.device)[:, None, None]  # [B, 1, 1]
    visible = (torch.arange(width, device=first.tokens.device) < owned)[:, None]  # [B, 1, 1, width]
    return visual, MediaLayout(index=None, visible=visible, any_visible=owned > 0)
