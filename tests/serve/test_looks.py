"""Requests in pieces, mixed, thrown out and begun anew see what whole prompts see."""

import random
from dataclasses import dataclass

import pytest
import torch

from serve.vllm_plugin import looks as looks_module
from serve.vllm_plugin.looks import Requests, enter
from vlm.fusion import index_media, lay_out_media

IMAGE, WORD, ROOM = 1, 0, 12


@dataclass
class Asked:
    """A request: its tokens, and for each of its images the names of its visual tokens."""

    tokens: list[int]
    images: list[list[int]]
    slot: int = 0
    computed: int = 0

    def seen(self, attend: str) -> list[set[int]]:
        """The names of the visual tokens that each token sees, by the layout of whole prompts."""
        lengths = [len(image) for image in self.images]
        index, start = index_media(torch.tensor([self.tokens]), IMAGE, [1] * len(lengths))
        layout = lay_out_media(index, start, lengths, attend)
        names = torch.tensor([name for image in self.images for name in image] or [0])
        keys = names[layout.index[0]] if layout.index is not None else names
        return [set(keys[row].tolist()) for row in layout.visible[0, 0]]


def make(numbers: random.Random, first_name: int) -> Asked:
    tokens, images = [], []
    for _ in range(numbers.randrange(4, 20)):
        if len(images) < 3 and numbers.random() < 0.3:
            images.append([first_name + sum(map(len, images)) + k for k in range(numbers.randrange(1, 5))])
            tokens.append(IMAGE)
        else:
            tokens.append(WORD)
    return Asked(tokens, images)


@pytest.mark.parametrize("attend", ["last", "all"])
@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_requests_see_what_whole_prompts_see(attend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 2:
        monkeypatch.setattr(looks_module, "TOGETHER", 6)  # requests of one token look in several groups
    numbers = random.Random(seed)
    asked = [make(numbers, 100 * number) for number in range(1, 6)]
    names, owners = torch.full((8, ROOM), -1), torch.randint(1, 4, (8, ROOM), dtype=torch.int32)  # left by others
    free = list(range(8))
    thrown_out = 0
    while waiting := [one for one in asked if one.computed < len(one.tokens)]:
        step = numbers.sample(waiting, numbers.randrange(1, len(waiting) + 1))
        pieces = [min(numbers.choice([1, 1, 3, 9]), len(one.tokens) - one.computed) for one in step]
        for one in step:
            if one.computed == 0:
                one.slot = free.pop(numbers.randrange(len(free)))
        spans = [one.tokens[one.computed : one.computed + piece] for one, piece in zip(step, pieces, strict=True)]
        flat = torch.tensor([token for span in spans for token in span])
        new = [
            one.images[one.tokens[: one.computed].count(IMAGE) + k]
            for one, span in zip(step, spans, strict=True)
            for k in range(span.count(IMAGE))
        ]
        starts = [sum(pieces[:k]) for k in range(len(pieces) + 1)]
        begins = torch.tensor([one.computed == 0 for one in step])
        requests = Requests(torch.tensor([one.slot for one in step]), starts, begins)
        (request, column), looks = enter(owners, requests, flat == IMAGE, [len(image) for image in new], attend)
        names[requests.slots[request], column] = torch.tensor(
            [name for image in new for name in image], dtype=torch.long
        )
        found: dict[int, set[int]] = {}
        for look in looks:
            assert look.mask.any(-1).all(), "softmax over nothing"
            assert len(look.requests) == 1 or look.mask[:, :, 0].numel() <= looks_module.TOGETHER
            for row, slot in enumerate(requests.slots[look.requests].tolist()):
                for column, token in enumerate(look.tokens[row].tolist()):
                    visible = look.mask[row, 0, column] & look.sees[row, column]
                    assert token not in found
                    found[token] = set(names[slot, : len(visible)][visible].tolist())
        for one, start, piece in zip(step, starts, pieces, strict=False):
            expected = one.seen(attend)[one.computed : one.computed + piece]
            assert [found.get(start + k, set()) for k in range(piece)] == expected
            one.computed += piece
            if thrown_out < 3 and numbers.random() < 0.2:
                free.append(one.slot)
                one.computed, thrown_out = 0, thrown_out + 1


def test_tokens_without_images_look_at_nothing() -> None:
    owners = torch.ones(2, 4, dtype=torch.int32)
    requests = Requests(torch.tensor([1, 0]), [0, 3, 4], torch.tensor([True, True]))
    _, looks = enter(owners, requests, torch.zeros(4, dtype=torch.bool), [], "all")
    assert looks == ()
