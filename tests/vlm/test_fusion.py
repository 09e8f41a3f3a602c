"""Which image each token sees, against loops that follow the definition."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.configuration import CrossAttention
from vlm.fusion import gated_layer_indices, index_media, lay_out_media

IMAGE = 7
PAD = 0


@dataclass(frozen=True)
class Packed:
    """rows: documents of pieces, each piece a number of text tokens or (negative) of image tokens of one image."""

    rows: list[list[list[int]]]

    @property
    def width(self) -> int:
        return max(sum(abs(piece) for document in row for piece in document) for row in self.rows)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """input_ids, position_ids (padding goes on counting), image tokens of each image."""
        ids, positions, placeholders = [], [], []
        for row in self.rows:
            tokens: list[int] = []
            places: list[int] = []
            for document in row:
                length = sum(abs(piece) for piece in document)
                places += range(length)
                for piece in document:
                    tokens += [IMAGE] * -piece if piece < 0 else [1] * piece
                    placeholders += [-piece] if piece < 0 else []
            missing = self.width - len(tokens)
            ids.append(tokens + [PAD] * missing)
            positions.append(places + [places[-1] + 1 + n for n in range(missing)])
        return torch.tensor(ids), torch.tensor(positions), placeholders

    def expected(self) -> tuple[list[list[int]], list[list[int]]]:
        """media_index and document_start by walking through the documents."""
        seen = 0
        media, starts = [], []
        for row in self.rows:
            media_row: list[int] = []
            starts_row: list[int] = []
            for document in row:
                current, start = 0, seen + 1
                for piece in document:
                    if piece < 0:
                        seen += 1
                        current = seen
                    media_row += [current] * abs(piece)
                    starts_row += [start] * abs(piece)
            missing = self.width - len(media_row)
            media.append(media_row + media_row[-1:] * missing)
            starts.append(starts_row + starts_row[-1:] * missing)
        return media, starts


PIECES = st.integers(1, 3) | st.integers(-3, -1)
DOCUMENTS = st.lists(PIECES, min_size=1, max_size=5)
PACKED = st.lists(st.lists(DOCUMENTS, min_size=1, max_size=3), min_size=1, max_size=3).map(Packed)


@given(PACKED)
@settings(max_examples=150, deadline=None)
def test_each_token_knows_the_latest_image_of_its_own_document(packed: Packed) -> None:
    ids, positions, placeholders = packed.tensors()
    media, start = index_media(ids, IMAGE, placeholders, positions)
    assert (media.tolist(), start.tolist()) == packed.expected()


@given(st.lists(DOCUMENTS, min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_without_positions_a_row_is_a_document(documents: list[list[int]]) -> None:
    packed = Packed([[document] for document in documents])
    ids, _, placeholders = packed.tensors()
    media, start = index_media(ids, IMAGE, placeholders)
    assert (media.tolist(), start.tolist()) == packed.expected()


@given(PACKED, st.sampled_from(["last", "all"]), st.data())
@settings(max_examples=150, deadline=None)
def test_a_layout_shows_each_token_exactly_the_visual_tokens_of_its_images(
    packed: Packed, attend: str, data: Any
) -> None:
    ids, positions, placeholders = packed.tensors()
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=len(placeholders), max_size=len(placeholders)))
    unused = data.draw(st.lists(st.integers(1, 2), min_size=0 if lengths else 1, max_size=1))  # images nobody refers to
    lengths = [*lengths, *unused]
    media, start = index_media(ids, IMAGE, placeholders, positions)
    begin = data.draw(st.integers(0, packed.width - 1))  # decoding looks at the last tokens alone
    layout = lay_out_media(media[:, begin:], start[:, begin:], lengths, attend)
    owners = [slot for slot, length in enumerate(lengths, start=1) for _ in range(length)]
    expected_media, expected_start = packed.expected()
    keys = layout.visible.shape[-1]
    rows = (
        layout.index.tolist()
        if layout.index is not None
        else [[row * keys + key for key in range(keys)] for row in range(len(ids))]
    )
    for row, visible in enumerate(layout.visible[:, 0].tolist()):
        for position, flags in enumerate(visible):
            latest, first = expected_media[row][begin + position], expected_start[row][begin + position]
            wanted = {latest} if attend == "last" else set(range(first, latest + 1))
            shown = [rows[row][key] for key in range(keys) if flags[key]]
            assert shown == [i for i, slot in enumerate(owners) if latest and slot in wanted]
            assert layout.any_visible[row, position, 0].item() == (latest > 0)
    assert layout.visible.shape == (len(ids), 1, packed.width - begin, keys)
    most = max(len({j for row in visible for j, seen in enumerate(row) if seen}) for visible in layout.visible[:, 0])
    assert keys == max(1, most)  # no key that nobody in the widest row sees


def test_rows_that_own_equal_shares_of_the_visual_tokens_are_not_gathered() -> None:
    ids = torch.tensor([[1, IMAGE, 1], [IMAGE, 1, 1]])
    media, start = index_media(ids, IMAGE, (1, 1))
    assert lay_out_media(media, start, (4, 4), "last").index is None
    assert lay_out_media(media, start, (4, 3), "last").index is not None
    assert lay_out_media(media, start, (4, 4, 4), "last").index is not None
    assert lay_out_media(media.flip(0), start.flip(0), (4, 4), "last").index is not None


def test_left_padding_whose_positions_are_all_zero_sees_nothing() -> None:
    ids = torch.tensor([[PAD, PAD, IMAGE, 1], [IMAGE, 1, IMAGE, 1]])
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    media, start = index_media(ids, IMAGE, (1, 1, 1), positions)
    assert media.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert start.tolist() == [[1, 1, 1, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("placeholders", "numbers"),
    [((4,), ("3 image tokens", "1 images need 4")), ((), ("3 image tokens", "0 images need 0"))],
)
def test_a_mismatch_of_image_tokens_and_images_names_both_counts(
    placeholders: tuple[int, ...], numbers: tuple[str, str]
) -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 1]])
    with pytest.raises(ValueError, match=numbers[0]) as error:
        index_media(ids, IMAGE, placeholders)
    assert numbers[1] in str(error.value)


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3]), (7, [])])
def test_gated_blocks_stand_before_every_nth_layer(every: int, expected: list[int]) -> None:
    assert gated_layer_indices(CrossAttention(every=every), 6) == expected
