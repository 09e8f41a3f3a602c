"""Batches: padding that changes nothing, pictures in order, a picture where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.collate import Batch, Sample, collate_chat, collate_text, find_documents, pad_rows, split_pixels
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


def collated(processor: VisionLanguageProcessor, examples: list[Example], pictures: list[Image.Image]) -> Batch:
    """The pictures are those of all examples, in order."""
    counts = [len(example.images) for example in examples]
    pixels = split_pixels(processor.pixels(pictures), counts, counts) if pictures else [{} for _ in examples]
    return collate_chat([[Sample(*both)] for both in zip(examples, pixels, strict=True)], processor)


@pytest.fixture
def processor(tiny_tokenizer: Any) -> VisionLanguageProcessor:
    return plain_processor(tiny_tokenizer, 4)


def test_rows_are_padded_on_the_right_and_padding_is_never_learned() -> None:
    rows = [Example([5, 6, 7], [IGNORED, 6, 7], (), "a"), Example([8], [8], (), "b")]
    input_ids, labels = pad_rows([[row] for row in rows], pad=3)
    assert input_ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert labels.tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]


def test_documents_of_a_row_lie_one_behind_the_other_and_none_predicts_the_next() -> None:
    a, b, c = (Example(ids, ids, (), "") for ids in ([5, 6, 7], [8, 9], [4]))
    batch = collate_text([[a, b], [c]], pad=3, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 3, 3, 3]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED] * 5]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch.documents == ((0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 5))
    assert (batch.tokens, batch.room, batch.supervised) == (6, 10, 3)


def test_every_token_belongs_to_a_document() -> None:
    assert find_documents([[2, 3], [5], [1]], 5) == [(0, 0, 2), (0, 2, 5), (1, 0, 5), (2, 0, 1), (2, 1, 5)]
    assert find_documents([], 1) == [(0, 0, 1)]


def test_pixels_are_split_by_whose_they_are() -> None:
    pixels = {"pixel_values": torch.arange(6), "image_sizes": torch.arange(4)}
    parts = split_pixels(pixels, views=[3, 0, 3], images=[1, 0, 3])
    assert [part.get("pixel_values", torch.empty(0)).tolist() for part in parts] == [[0, 1, 2], [], [3, 4, 5]]
    assert [part.get("image_sizes", torch.empty(0)).tolist() for part in parts] == [[0], [], [1, 2, 3]]
    assert parts[1] == {}


@pytest.mark.parametrize("packed", [False, True])
def test_of_no_rows_comes_a_batch_that_counts_nothing(processor: VisionLanguageProcessor, packed: bool) -> None:
    for batch in (collate_chat([], processor, packed), collate_text([], 0, packed)):
        assert batch.input_ids.shape == (1, 1)
        assert (batch.supervised, batch.tokens) == (0, 0)
        assert batch.labels.eq(IGNORED).all()
    assert collate_chat([], processor, packed).pixels["pixel_values"].shape[0] == 1


def test_a_batch_knows_its_images_and_counts_its_tokens(processor: VisionLanguageProcessor) -> None:
    examples = examples_of(processor, TURNS)
    pictures = [picture(n) for n in range(3)]
    batch = collated(processor, examples, pictures)
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
    batch = collated(processor, examples_of(processor, [TURNS[0], TURNS[3]]), [])
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
        batch = collated(processor, [examples[r] for r in rows], [image for r in rows for image in pictures[r]])
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


def test_a_batch_of_text_has_no_pictures_and_moves_as_one(processor: VisionLanguageProcessor) -> None:
    batch = collate_text([[example] for example in examples_of(processor, [TURNS[0], TURNS[3]])], pad=0)
    assert batch.pixels == {}
    assert batch.media_index.eq(0).all()
    shown = collated(processor, examples_of(processor, [TURNS[1]]), [picture(0)])
    for whole in (batch, shown):
        moved = whole.to(torch.device("meta"))
        tensors = (moved.input_ids, moved.labels, moved.media_index, moved.document_start, *moved.pixels.values())
        assert all(tensor.is_meta for tensor in tensors)
        assert (moved.pixels.keys(), moved.supervised) == (whole.pixels.keys(), whole.supervised)
