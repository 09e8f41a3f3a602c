"""Batches: padding that changes nothing, pictures in order, a picture where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.collate import collate_chat, collate_text, pad_rows
from data.encode import IGNORED, Example, encode_record
from data.records import IMAGE_PART, Record, text_part
from tests.processors import plain_processor
from vlm import VisionLanguageProcessor, load

TinyModels = Callable[[str, str], Path]
TURNS = [
    (0, "what is nothing at all?", "no thing"),
    (1, "what?", "a cube"),
    (2, "and these two?", "cones"),
    (0, "?", "!"),
]


def picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST)


def examples_of(processor: VisionLanguageProcessor, turns: list[tuple[int, str, str]]) -> list[Example]:
    made = []
    for row, (count, question, answer) in enumerate(turns):
        messages = (
            {"role": "user", "content": [*[IMAGE_PART] * count, text_part(question)]},
            {"role": "assistant", "content": [text_part(answer)]},
        )
        images = tuple(Path(f"{row}-{n}.png") for n in range(count))
        record = Record(f"rows:{row}", messages, images)
        placeholders = processor.placeholders([picture(0)] * count)
        made.append(encode_record(record, processor.chat, 512, "assistant", np.random.default_rng(0), placeholders))
    return made


@pytest.fixture
def processor(tiny_tokenizer: Any) -> VisionLanguageProcessor:
    return plain_processor(tiny_tokenizer, 4)


def test_rows_are_padded_on_the_right_and_padding_is_never_learned() -> None:
    rows = [Example([5, 6, 7], [IGNORED, 6, 7], (), "a"), Example([8], [8], (), "b")]
    input_ids, labels = pad_rows(rows, pad=3)
    assert input_ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_a_batch_knows_its_images_and_counts_its_tokens(processor: VisionLanguageProcessor) -> None:
    examples = examples_of(processor, TURNS)
    pictures = [picture(n) for n in range(3)]
    batch = collate_chat(examples, pictures, processor)
    width = max(len(example.input_ids) for example in examples)
    assert batch.input_ids.shape == batch.labels.shape == batch.media_index.shape == (4, width)
    assert batch.tokens == sum(len(example.input_ids) for example in examples)
    assert batch.supervised == int((batch.labels[:, 1:] != IGNORED).sum())
    assert torch.equal(batch.pixels["pixel_values"], processor.pixels(pictures)["pixel_values"])
    assert batch.pixels["image_sizes"].tolist() == [[image.height, image.width] for image in pictures]
    seen = 0
    for row, example in enumerate(examples):
        start, current, placed = seen + 1, 0, 0
        for position in range(width):
            if position < len(example.input_ids) and example.input_ids[position] == processor.image_token_id:
                seen += placed % 4 == 0
                placed += 1
                current = seen
            assert batch.media_index[row, position] == current
            assert batch.document_start[row, position] == start


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_a_batch_without_images_gets_a_blank_one_that_nobody_sees(tiny_models: TinyModels, fusion: str) -> None:
    model, processor = load(tiny_models(fusion, "perceiver"))
    batch = collate_chat(examples_of(processor, [TURNS[0], TURNS[3]]), [], processor)
    assert batch.pixels["pixel_values"].shape == (1, 3, 32, 32)
    assert batch.media_index.eq(0).all()
    given = {"media_index": batch.media_index, "document_start": batch.document_start}
    with torch.no_grad():
        blank = model(input_ids=batch.input_ids, **batch.pixels, **given).logits
        other = model(input_ids=batch.input_ids, **processor.pixels([picture(1)]), **given).logits
        none = model(input_ids=batch.input_ids).logits
    assert torch.equal(blank, other)
    assert torch.equal(blank, none)


@pytest.mark.parametrize(("fusion", "connector"), [("early", "mlp"), ("deep", "perceiver")])
def test_a_batchs_loss_is_the_sum_of_its_rows_losses(tiny_models: TinyModels, fusion: str, connector: str) -> None:
    model, processor = load(tiny_models(fusion, connector))
    examples = examples_of(processor, TURNS)
    pictures = [[], [picture(0)], [picture(1), picture(2)], []]

    def summed(rows: list[int]) -> torch.Tensor:
        batch = collate_chat([examples[r] for r in rows], [image for r in rows for image in pictures[r]], processor)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids,
                **batch.pixels,
                media_index=batch.media_index,
                document_start=batch.document_start,
            ).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    together = summed([0, 1, 2, 3])
    torch.testing.assert_close(together, torch.stack([summed([row]) for row in range(4)]).sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together, summed([3, 2, 0, 1]), rtol=1e-5, atol=1e-4)


def test_a_mismatch_of_pictures_and_rows_is_found_when_the_batch_is_made(processor: VisionLanguageProcessor) -> None:
    with pytest.raises(ValueError, match="12 image tokens, but its 2 images need 8"):
        collate_chat(examples_of(processor, TURNS), [picture(0), picture(1)], processor)


def test_a_batch_of_text_has_no_pictures_and_moves_as_one(processor: VisionLanguageProcessor) -> None:
    batch = collate_text(examples_of(processor, [TURNS[0], TURNS[3]]), pad=0)
    assert batch.pixels == {}
    assert batch.media_index.eq(0).all()
    shown = collate_chat(examples_of(processor, [TURNS[1]]), [picture(0)], processor)
    for whole in (batch, shown):
        moved = whole.to(torch.device("meta"))
        tensors = (moved.input_ids, moved.labels, moved.media_index, moved.document_start, *moved.pixels.values())
        assert all(tensor.is_meta for tensor in tensors)
        assert (moved.pixels.keys(), moved.supervised) == (whole.pixels.keys(), whole.supervised)
