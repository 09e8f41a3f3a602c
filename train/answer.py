"""Greedy answers of a model to many prompts: batched `generate`, prompts of like length together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from data.pictures import ImageRef, image_size, load_image
from vlm.configuration import context_length
from vlm.errors import UserError
from vlm.modeling import VisionLanguageModel
from vlm.processing import VisionLanguageProcessor


@dataclass(frozen=True)
class Question:
    """One prompt: a user's text, with or without a picture before it."""

    id: str
    text: str
    image: ImageRef | None = None


class Answerer:
    """Asks one model. Every prompt is the chat template's, as training and serving render it."""

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VisionLanguageProcessor,
        batch_size: int = 64,
        max_tokens: int = 32,
        read: Callable[[ImageRef], Image.Image] = load_image,
    ) -> None:
        self.model, self.processor, self.read = model, processor, read
        self.batch_size, self.max_tokens = batch_size, max_tokens

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[str, str]]:
        """(id, answer) of every question, shortest prompts first."""
        encoded = [(question, self._encode(question)) for question in questions]
        encoded.sort(key=lambda pair: len(pair[1]))
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            texts = self._generate([ids for _, ids in batch], [question.image for question, _ in batch])
            yield from zip((question.id for question, _ in batch), texts, strict=True)

    def _encode(self, question: Question) -> list[int]:
        parts: list[dict[str, Any]] = [{"type": "image"}] if question.image is not None else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}
        sizes = [] if question.image is None else [image_size(question.image)]
        placeholders = [self.processor.image_tokens.placeholders(*size) for size in sizes]
        ids = self.processor.chat.encode([message], placeholders, add_generation_prompt=True).input_ids
        context = context_length(self.model.config.text_config)
        if context is not None and len(ids) + self.max_tokens > context:
            raise UserError(
                f"question {question.id}: {len(ids)} tokens and an answer of up to {self.max_tokens} don't fit the "
                f"model's context of {context}"
            )
        return ids

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], images: Sequence[ImageRef | None]) -> list[str]:
        tokenizer, device = self.processor.tokenizer, self.model.device
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        pictures = [self.read(path) for path in images if path is not None]
        pixels = self.processor.pixels(pictures) if pictures else {}
        out = self.model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            **{name: tensor.to(device) for name, tensor in pixels.items()},
            max_new_tokens=self.max_tokens,
            do_sample=False,
        )
        texts: list[str] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]
