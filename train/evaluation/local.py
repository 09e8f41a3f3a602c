"""Answers of a model in this process: batched greedy `generate`, the next batch made ready meanwhile."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from data.pictures import image_size, load_image
from train.evaluation.prompts import Prompt, Reply
from vlm.configuration import context_length
from vlm.errors import UserError
from vlm.modeling import VisionLanguageModel
from vlm.processing import VisionLanguageProcessor

READY = 2  # batches that are made ready before they are needed


@dataclass(frozen=True)
class Batch:
    """Prompts that can be asked, as ids; pixels: tensors of their images, in order; failed: the others."""

    prompts: list[Prompt]
    ids: list[list[int]]
    pixels: dict[str, torch.Tensor]
    failed: list[Reply]


class LocalModel:
    """Asks one model. Every prompt is the chat template's, as training and serving render it.

    rank: answers are the likeliest of a prompt's choices, where it has any, and nothing is generated.
    """

    # an answer may depend on what else is in its batch (by the last bits of sums), so batches are never split
    keeps_batches = True

    def __init__(
        self, model: VisionLanguageModel, processor: VisionLanguageProcessor, max_tokens: int, rank: bool = False
    ) -> None:
        self.model, self.processor, self.max_tokens, self.rank = model, processor, max_tokens, rank
        self.context = context_length(model.config.text_config)
        own = model.generation_config
        self.decoding = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id if own is None else own.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )

    def replies(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Reply]]:
        """What became of each batch's prompts, batch by batch."""
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for prompts in batches:
                waiting.append(pool.submit(self.prepare, prompts))
                if len(waiting) > READY:
                    yield self._reply(waiting.popleft().result())
            while waiting:
                yield self._reply(waiting.popleft().result())

    def prepare(self, prompts: Sequence[Prompt]) -> Batch:
        """Prompts to ids and pixels. What can't be asked (no image there, too long) fails alone."""
        found, ids, pictures, failed = [], [], [], []
        for prompt in prompts:
            try:
                encoded = self.encode(prompt)
                pictures += [load_image(image) for image in prompt.images]
            except UserError as error:
                failed.append(Reply.failed(prompt, error))
                continue
            found.append(prompt)
            ids.append(encoded)
        pixels = self.processor.pixels(pictures) if pictures else {}
        return Batch(found, ids, pixels, failed)

    def encode(self, prompt: Prompt) -> list[int]:
        sizes = [image_size(image) for image in prompt.images]
        placeholders = [self.processor.image_tokens.placeholders(*size) for size in sizes]
        ids = self.processor.chat.encode(prompt.messages(), placeholders, add_generation_prompt=True).input_ids
        if self.context is not None and len(ids) + self.max_tokens > self.context:
            raise UserError(
                f"{len(ids)} tokens and an answer of up to {self.max_tokens} don't fit the model's context of "
                f"{self.context}"
            )
        return ids

    def _reply(self, batch: Batch) -> list[Reply]:
        if not batch.prompts:
            return batch.failed
        try:
            answer = self._rank if self.rank else self._generate
            texts = answer(batch)
        except torch.OutOfMemoryError:
            raise UserError(
                f"no memory left for {len(batch.prompts)} questions at once: use a lower --batch-size, and another "
                "--out, since answers may depend on it"
            ) from None
        answered = [Reply(prompt.id, text) for prompt, text in zip(batch.prompts, texts, strict=True)]
        return [*answered, *batch.failed]

    @torch.inference_mode()
    def _generate(self, batch: Batch) -> list[str]:
        input_ids, mask = self._padded(batch.ids, left=True)
        out = self.model.generate(
            input_ids,
            attention_mask=mask,
            **self._on_device(batch.pixels),
            generation_config=self.decoding,
        )
        texts: list[str] = self.processor.tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _rank(self, batch: Batch) -> list[str]:
        likely = self.likelihoods(batch)
        return [prompt.choices[row.index(max(row))] for prompt, row in zip(batch.prompts, likely, strict=True)]

    @torch.inference_mode()
    def likelihoods(self, batch: Batch) -> list[list[float]]:
        """Of each prompt's choices the log-probability behind the prompt, summed over the choice's tokens."""
        pixels = self._on_device(batch.pixels)
        visual = self.model.encode_images(**pixels) if pixels else None
        found, first_slot = [], 1
        for prompt, ids in zip(batch.prompts, batch.ids, strict=True):
            endings = [self.processor.chat.encode_text(choice, inner=True) for choice in prompt.choices]
            rows, mask = self._padded([ids + ending for ending in endings], left=False)
            slots = [*range(first_slot, first_slot := first_slot + len(prompt.images))]
            shown = visual.select(slots * len(endings)) if visual is not None and slots else None
            logits = self.model(rows, attention_mask=mask, visual=shown, use_cache=False).logits
            logprobs = logits[:, len(ids) - 1 : -1].float().log_softmax(-1)
            wanted = rows[:, len(ids) :].unsqueeze(-1)
            scored = logprobs.gather(-1, wanted).squeeze(-1) * mask[:, len(ids) :]
            found.append(scored.sum(-1).tolist())
        return found

    def _padded(self, rows: Sequence[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] ids and their mask, on the model's device."""
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            place = slice(width - len(ids), width) if left else slice(0, len(ids))
            input_ids[row, place] = torch.tensor(ids)
            mask[row, place] = 1
        return input_ids.to(self.model.device), mask.to(self.model.device)

    def _on_device(self, pixels: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.to(self.model.device) for name, tensor in pixels.items()}
