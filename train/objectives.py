"""What a stage learns: how its rows become batches, what its loss is, and what it leaves behind."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from data.bad import Bad
from data.collate import Batch, Sample, collate_chat, collate_text, pad_rows, split_pixels
from data.encode import IGNORED, Example, encode_record
from data.loader import ImageCache
from data.pictures import ImageRef, image_size
from data.records import Record
from train.adapters import add_lora, draw_anew, merged, save_adapter
from train.build import build_clip, build_language_model, build_model, clip_processor, find_tokenizer
from train.recipe import Recipe, Stage
from train.runs import Run
from vlm.chat import ChatEncoder
from vlm.checkpoint import load, save
from vlm.configuration import context_length
from vlm.contrastive import contrastive_loss, recall_at_1
from vlm.errors import UserError
from vlm.processing import VisionLanguageProcessor

if TYPE_CHECKING:
    from peft import PeftModel


class Objective(ABC):
    """One stage's network and loss.

    `model` holds everything that could learn, `language_model` is what reads packed rows of up to `room` tokens.

    Its `encode`, `load` and `collate` are the `Preparation` of its loader. A micro-batch has `supervised` (what the
    loss is divided by), `tokens`, `room`, `shortened` (file:line of rows that weren't learned from whole) and
    `to(device)`.
    """

    model: Any
    language_model: Any = None
    room = 0
    processor: VisionLanguageProcessor
    stage: Stage
    read: ImageCache
    chance: float  # the loss of a guess among all that could be predicted

    @abstractmethod
    def encode(self, record: Record, rng: np.random.Generator) -> Example:
        """The row as tokens; UserError when it can't be learned from."""

    def load(self, examples: Sequence[Example]) -> list[Sample | Bad]:
        """Pictures decoded, changed as the stage says, and made into pixels."""
        made: list[Sample | Bad | None] = []
        pictures: list[list[Image.Image]] = []
        for example in examples:
            try:
                pictures.append(self._pictures(example))
                made.append(None)
            except UserError as error:
                made.append(Bad.of(example.where, error))
        whole = [replace(one, rng=None) for one, bad in zip(examples, made, strict=True) if bad is None]
        flat = [picture for some in pictures for picture in some]
        pixels: list[dict[str, torch.Tensor]] = [{} for _ in whole]
        if flat:
            views = [sum(self.processor.image_tokens.views(p.height, p.width) for p in some) for some in pictures]
            pixels = split_pixels(self.processor.pixels(flat), views, [len(some) for some in pictures])
        samples = iter(map(Sample, whole, pixels))
        return [next(samples) if bad is None else bad for bad in made]

    def _pictures(self, example: Example) -> list[Image.Image]:
        if not example.images:
            return []
        pictures = [self.read(image) for image in example.images]
        if example.placeholders and list(example.placeholders) != self.processor.placeholders(pictures):
            raise UserError("an image has another size than its header says")
        assert example.rng is not None
        edge = self.processor.shorter_edge
        return [self.stage.augment(picture, example.rng, edge) for picture in pictures]

    @abstractmethod
    def collate(self, rows: Sequence[Sequence[Sample]]) -> Any:
        """One micro-batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss summed over what `batch.supervised` counts, and further sums to be shown divided by the same."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Leaves a folder that the next stage, or anybody, can load."""


class Contrastive(Objective):
    """CLIP's objective over images and one of their captions each."""

    def __init__(self, recipe: Recipe, stage: Stage, run: Run, read: ImageCache) -> None:
        tokenizer = find_tokenizer(recipe, run)
        self.model = build_clip(recipe, tokenizer)
        self.tokenizer, self.stage, self.read = tokenizer, stage, read
        self.processor = clip_processor(recipe.model, self.model.config.vision_config, tokenizer)
        self.chat = ChatEncoder(tokenizer, None, self.processor.image_token)
        self.end = self.model.config.text_config.eos_token_id
        self.length = self.model.config.text_config.max_position_embeddings
        self.chance = math.log(stage.batch_size)

    def encode(self, record: Record, rng: np.random.Generator) -> Example:
        _check_images(record, 1)
        if record.kind == "document":
            raise UserError(f"{record.where}: a document, where the stage takes images with captions")
        captions = record.captions or ("".join(part["text"] for part in record.messages[-1]["content"]),)
        tokens = self.chat.encode_text(captions[int(rng.integers(len(captions)))])
        ids = [*tokens[: self.length - 1], self.end]
        return Example(ids, ids, record.images, record.where, int(len(tokens) >= self.length), rng=rng)

    def collate(self, rows: Sequence[Sequence[Sample]]) -> "CaptionBatch":
        examples = [sample.example for row in rows for sample in row]
        ids, _ = pad_rows([[example] for example in examples], self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        numbers = {tuple(example.input_ids): number for number, example in enumerate(examples)}
        same = torch.tensor([numbers[tuple(example.input_ids)] for example in examples])
        pixels = [sample.pixels["pixel_values"] for row in rows for sample in row]
        cut = tuple(example.where for example in examples if example.dropped)
        return CaptionBatch(ids[: len(examples)], mask, torch.cat(pixels) if pixels else torch.empty(0), same, cut)

    def loss(self, model: nn.Module, batch: "CaptionBatch") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values)
        hits = recall_at_1(out.image_embeds.detach(), out.text_embeds.detach(), batch.same)
        scale = self.model.logit_scale.clamp(max=float(np.log(100)))
        return contrastive_loss(out.image_embeds, out.text_embeds, scale, batch.same), {"recall_at_1": hits}

    def save(self, folder: Path) -> None:
        save(self.model, self.processor, folder)


class CaptionBatch:
    """input_ids, attention_mask: [B, T]; pixel_values: [B, 3, H, W]; same: [B], equal numbers for equal captions."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        same: torch.Tensor,
        shortened: tuple[str, ...] = (),
    ) -> None:
        self.input_ids, self.attention_mask, self.pixel_values, self.same = (
            input_ids,
            attention_mask,
            pixel_values,
            same,
        )
        self.shortened = shortened
        self.supervised, self.tokens, self.room = len(same), int(attention_mask.sum()), input_ids.numel()

    def to(self, device: torch.device) -> "CaptionBatch":
        ids, mask, pixels = self.input_ids.to(device), self.attention_mask.to(device), self.pixel_values.to(device)
        return CaptionBatch(ids, mask, pixels, self.same.to(device), self.shortened)


class Language(Objective):
    """Next-token prediction by the LM alone, on chats without images."""

    def __init__(self, recipe: Recipe, stage: Stage, run: Run) -> None:
        tokenizer = find_tokenizer(recipe, run)
        self.model = build_language_model(recipe.model.language, tokenizer, run)
        self.language_model, self.tokenizer, self.stage = self.model, tokenizer, stage
        self.chat = ChatEncoder(tokenizer, None, "<image>")
        self.room, self.context = _room(recipe, stage, self.model.config)
        self.chance = math.log(self.model.config.vocab_size)

    def encode(self, record: Record, rng: np.random.Generator) -> Example:
        _check_images(record, 0)
        return encode_record(record, self.chat, self.context, self.stage.train_on, rng)

    def load(self, examples: Sequence[Example]) -> list[Sample | Bad]:
        return list(map(Sample, examples))

    def collate(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        examples = [[sample.example for sample in row] for row in rows]
        return collate_text(examples, self.tokenizer.pad_token_id, self.stage.packing.mode == "pack")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = model(input_ids=batch.input_ids, **batch.packed, use_cache=False).logits
        return summed_cross_entropy(logits, batch.labels), {}

    def save(self, folder: Path) -> None:
        save(self.model, self.tokenizer, folder)


class Chat(Objective):
    """Answers about images: alignment on captions, instruction tuning, with or without LoRA."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        run: Run,
        before: Path | None,
        read: ImageCache,
    ) -> None:
        self.vlm: Any
        self.processor: VisionLanguageProcessor
        self.base = before or recipe.model.pretrained
        if self.base is not None:
            self.vlm, self.processor = load(self.base, dtype=torch.float32)
        else:
            self.vlm, self.processor = build_model(recipe, find_tokenizer(recipe, run), run)
        self.adapter_folder = run.adapter
        self.stage, self.read = stage, read
        self.room, self.context = _room(recipe, stage, self.vlm.config.text_config)
        self.chance = math.log(self.vlm.config.text_config.vocab_size)
        if stage.reset:
            draw_anew(self.vlm, stage.reset)
        self.adapter: PeftModel | None = add_lora(self.vlm, stage.lora) if stage.lora else None
        self.model = self.vlm  # adapters sit inside it: its forward is theirs
        self.language_model = self.vlm.language_model

    def encode(self, record: Record, rng: np.random.Generator) -> Example:
        tokens = self.processor.image_tokens
        counts = [tokens.placeholders(*self._size(record, image)) for image in record.images]
        return encode_record(record, self.processor.chat, self.context, self.stage.train_on, rng, counts)

    def _size(self, record: Record, image: ImageRef) -> tuple[int, int]:
        """(height, width); where all sizes make as many tokens, the file isn't opened for it."""
        if self.processor.image_tokens.mode == "none":
            return 1, 1
        try:
            return image_size(image)
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None

    def collate(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return collate_chat(rows, self.processor, self.stage.packing.mode == "pack")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = model(
            input_ids=batch.input_ids,
            **batch.pixels,
            media_index=batch.media_index,
            document_start=batch.document_start,
            **batch.packed,
            use_cache=False,
        )
        return summed_cross_entropy(out.logits, batch.labels), {}

    def save(self, folder: Path) -> None:
        """The adapters are merged: the folder holds a whole model. Where nothing else was learned and the base is a
        saved model, the adapters are kept beside it as a peft folder, too."""
        if self.adapter is not None:
            alone = [part for part, rate in self.stage.learning_rates.items() if rate] == ["lora"]
            if alone and self.base is not None:
                save_adapter(self.adapter, self.adapter_folder, str(self.base))
            self.vlm, self.adapter = merged(self.adapter), None
        save(self.vlm, self.processor, folder)


def build_objective(recipe: Recipe, stage: Stage, run: Run, read: ImageCache) -> Objective:
    """The stage's objective, its network as the stages before have left it."""
    if stage.objective == "contrastive":
        return Contrastive(recipe, stage, run, read)
    if stage.objective == "language":
        return Language(recipe, stage, run)
    earlier = recipe.stages[: [other.name for other in recipe.stages].index(stage.name)]
    before = next((run.stage(other.name) for other in reversed(earlier) if other.objective == "chat"), None)
    return Chat(recipe, stage, run, before, read)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in fp32, summed over the supervised tokens. logits: [B, T, V]; labels: [B, T], not yet shifted."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _room(recipe: Recipe, stage: Stage, language: Any) -> tuple[int, int]:
    """Tokens that a packed row may have, and a document."""
    context = recipe.context or context_length(language)
    assert context is not None, "a recipe without a context is checked before"
    room = stage.packing.tokens or context
    return room, min(room, context)


def _check_images(record: Record, count: int) -> None:
    if len(record.images) != count:
        raise UserError(f"{record.where}: has {len(record.images)} images, where the stage takes {count}")
