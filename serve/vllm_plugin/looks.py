"""Which visual tokens the tokens of a step see, when requests come in pieces and mixed.

What `vlm.fusion` finds for whole prompts is found here from what the states of the requests know of earlier steps.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

TOGETHER = 65_536  # visual tokens whose keys and values are copied together, 134 MB of 8 x 64 in bf16


@dataclass
class Requests:
    """The requests of a step, whose tokens lie flat, one request after another.

    slots: where each one's state lies, which may differ from layer to layer; starts: its first token, and at the end
    the number of tokens; begins: it has no state yet; looks: who sees what, found when the images are known.
    """

    slots: torch.Tensor  # [B]
    starts: list[int]  # [B + 1]
    begins: torch.Tensor  # [B]
    looks: "tuple[Look, ...]" = ()


@dataclass(frozen=True)
class Look:
    """Tokens that look at images together: a row of one token for each of many requests, or all of one request.

    sees: whether a token sees anything; mask: what it looks at, which is everything where it sees nothing, since
    softmax over nothing is undefined.
    """

    tokens: torch.Tensor  # [R, T] their places in the step
    requests: torch.Tensor  # [R]
    sees: torch.Tensor  # [R, T, 1]
    mask: torch.Tensor  # [R, 1, T, M]


def enter(
    owners: torch.Tensor, requests: Requests, is_image: torch.Tensor, lengths: list[int], attend: str
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Look, ...]]:
    """Enters the images that come with a step, and finds what its tokens see.

    owners: [slots, M], changed; is_image: [T], True at the tokens that bring an image; lengths: visual tokens of each
    such image. Returns where their visual tokens go, (request, column) [S] each, and the looks.
    """
    device = owners.device
    owners[requests.slots[requests.begins]] = 0
    known = owners[requests.slots]  # [B, M]
    images_before = known.amax(1)
    starts = torch.tensor(requests.starts, device=device)
    seen = nn.functional.pad(is_image.cumsum(0), (1, 0))  # [T + 1] images among the tokens before
    request, column, number = _places(known, starts, is_image.nonzero()[:, 0], lengths)
    owners[requests.slots[request], column] = number.to(owners.dtype)
    known = owners[requests.slots]
    filled = (known > 0).sum(1).tolist()
    counts = [stop - start for start, stop in pairwise(requests.starts)]
    looks = []
    for rows in _groups(counts, filled):
        row = torch.tensor(rows, device=device)
        tokens = starts[row][:, None] + torch.arange(counts[rows[0]], device=device)  # [R, T]
        latest = images_before[row][:, None] + seen[tokens + 1] - seen[starts[row]][:, None]  # [R, T]
        owner = known[row, : max(filled[r] for r in rows)][:, None, :]  # [R, 1, M]
        visible = owner == latest[..., None] if attend == "last" else owner <= latest[..., None]
        visible &= owner > 0
        sees = visible.any(-1, keepdim=True)
        looks.append(Look(tokens, row, sees, (visible | ~sees)[:, None]))
    return (request, column), tuple(looks)


def _groups(counts: list[int], filled: list[int]) -> list[list[int]]:
    """Requests that look together: those of one token, so many that a copy of their images stays small, or one."""
    groups: list[list[int]] = []
    for row in sorted(range(len(counts)), key=lambda row: filled[row]):
        if counts[row] == 1 and filled[row]:
            if not groups or (len(groups[-1]) + 1) * filled[row] > TOGETHER:
                groups.append([])
            groups[-1].append(row)
    return groups + [[row] for row, count in enumerate(counts) if count > 1 and filled[row]]


def _places(
    known: torch.Tensor, starts: torch.Tensor, new: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each visual token [S] of the images whose tokens are `new`: its request, its column, its image's number."""
    request = torch.searchsorted(starts, new, right=True) - 1  # [n]
    before = (request[:, None] == request[None, :]).tril(-1)  # [n, n] images of the same request, earlier in this step
    sizes = torch.tensor(lengths, dtype=torch.long, device=known.device)
    first = (known > 0).sum(1)[request] + (before * sizes).sum(1)
    number = known.amax(1)[request] + before.sum(1) + 1
    image = torch.repeat_interleave(torch.arange(len(lengths), device=known.device), sizes)  # [S]
    within = torch.arange(len(image), device=known.device) - (sizes.cumsum(0) - sizes)[image]
    return request[image], first[image] + within, number[image]
