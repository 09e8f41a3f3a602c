"""What a stage learns: how its rows become batches, what its loss is, and what it leaves behind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn

from data.collate import Batch, collate_chat, collate_text
from data.encode import IGNORED, Example, encode_record
from data.loader import ImageCache
from data.pictures import ImageRef
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

Pair = tuple[Record, np.random.Generator]


class Objective(ABC):
    """One stage's network and loss. `model` holds everything that could learn."""

    model: Any

    @abstractmethod
    def make(self, pairs: Sequence[Pair]) -> Any:
        """One micro-batch; has `supervised` (what the loss is divided by), `tokens`, `shortened` and `to(device)`.

        `shortened`: file:line of the rows that were too long to be learned from whole.
        """

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

    def make(self, pairs: Sequence[Pair]) -> "CaptionBatch":
        texts, pictures = [], []
        for record, rng in pairs:
            captions = record.captions or ("".join(part["text"] for part in record.messages[-1]["content"]),)
            texts.append(captions[int(rng.integers(len(captions)))])
            pictures.append(
                self.stage.augment(_picture(self.read, record, record.images[0]), rng, self.processor.shorter_edge)
            )
        encoded = [self.chat.encode_text(text) for text in texts]
        rows = [[*tokens[: self.length - 1], self.end] for tokens in encoded]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        same = torch.tensor([numbers[text] for text in texts])
        cut = (record.where for (record, _), tokens in zip(pairs, encoded, strict=True) if len(tokens) >= self.length)
        return CaptionBatch(ids, mask, self.processor.pixels(pictures)["pixel_values"], same, tuple(cut))

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
        self.supervised, self.tokens = len(same), int(attention_mask.sum())

    def to(self, device: torch.device) -> "CaptionBatch":
        ids, mask, pixels = self.input_ids.to(device), self.attention_mask.to(device), self.pixel_values.to(device)
        return CaptionBatch(ids, mask, pixels, self.same.to(device), self.shortened)


class Language(Objective):
    """Next-token prediction by the LM alone, on chats without images."""

    def __init__(self, recipe: Recipe, stage: Stage, run: Run) -> None:
        tokenizer = find_tokenizer(recipe, run)
        self.model = build_language_model(recipe.model.language, tokenizer, run)
        self.tokenizer, self.stage = tokenizer, stage
        self.chat = ChatEncoder(tokenizer, None, "<image>")
        self.context = _context(recipe, self.model.config)

    def make(self, pairs: Sequence[Pair]) -> Batch:
        examples = [encode_record(record, self.chat, self.context, self.stage.train_on, rng) for record, rng in pairs]
        return collate_text(examples, self.tokenizer.pad_token_id)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return summed_cross_entropy(model(input_ids=batch.input_ids, use_cache=False).logits, batch.labels), {}

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
        self.context = _context(recipe, self.vlm.config.text_config)
        if stage.reset:
            draw_anew(self.vlm, stage.reset)
        self.adapter: PeftModel | None = add_lora(self.vlm, stage.lora) if stage.lora else None
        self.model = self.vlm  # adapters sit inside it: its forward is theirs

    def make(self, pairs: Sequence[Pair]) -> Batch:
        examples: list[Example] = []
        pictures: list[Image.Image] = []
        for record, rng in pairs:
            shown = [_picture(self.read, record, path) for path in record.images]
            placeholders = self.processor.placeholders(shown)
            example = encode_record(record, self.processor.chat, self.context, self.stage.train_on, rng, placeholders)
            examples.append(example)
            kept = shown[: len(example.images)]
            pictures += [self.stage.augment(picture, rng, self.processor.shorter_edge) for picture in kept]
        return collate_chat(examples, pictures, self.processor)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = model(
            input_ids=batch.input_ids,
            **batch.pixels,
            media_index=batch.media_index,
            document_start=batch.document_start,
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


def _context(recipe: Recipe, language: Any) -> int:
    context = recipe.context or context_length(language)
    assert context is not None, "a recipe without a context is checked before"
    return context


def _picture(read: ImageCache, record: Record, image: ImageRef) -> Image.Image:
    try:
        return read(image)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
