"""How many tokens an image becomes, and in which order: whole, or cut into tiles for high resolution.

anyres is LLaVA-NeXT's way (Liu et al. 2024; transformers' `LlavaNextModel.pack_image_features`): the whole image in one
small view, then the tiles of a grid put together again, without the rows and columns that only padding fills, a newline
token after each row. `tiles` keeps the views one after another as they are, for connectors whose tokens form no grid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import PILImageResampling

from vlm.settings import Count

LONGEST_EDGE = 50_000
Size = tuple[int, int]  # (height, width), as everywhere in transformers; original LLaVA files have (width, height)


@dataclass(frozen=True)
class Tiling:
    """none: an image is one view. pinpoints: (height, width) of the grids that an image may be cut into, in pixels,
    multiples of the encoder's image size; the one that keeps most of the image at the least waste is taken."""

    mode: Literal["none", "anyres", "tiles"] = "none"
    pinpoints: tuple[tuple[Count, Count], ...] = ()


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens stand for an image of a given size: the one place where they are counted.

    per_view: vectors that the connector makes of a view; side: rows and columns of the grid they form, 0 where they
    form none; view_size: pixels of a view's edge; marks: one image token stands for the image, whatever it has (deep
    fusion). Heights and widths are those of the decoded image.
    """

    per_view: int
    side: int
    view_size: int
    marks: bool = False
    mode: Literal["none", "anyres", "tiles"] = "none"
    pinpoints: tuple[Size, ...] = ()

    @property
    def largest(self) -> Size:
        """(height, width) of an image that has as many vectors as any: one that fills a grid leaves nothing out."""
        return max(((self.view_size, self.view_size), *self.pinpoints), key=lambda size: self.visual(*size))

    def grid(self, height: int, width: int) -> Size:
        """(rows, columns) of tiles."""
        best = select_best_resolution((height, width), [list(pinpoint) for pinpoint in self.pinpoints])
        return best[0] // self.view_size, best[1] // self.view_size

    def views(self, height: int, width: int) -> int:
        """Pictures that the encoder sees of the image: itself, and its tiles."""
        if self.mode == "none":
            return 1
        rows, columns = self.grid(height, width)
        return 1 + rows * columns

    def visual(self, height: int, width: int) -> int:
        """Vectors of the image that the LM sees."""
        if self.mode != "anyres":
            return self.per_view * self.views(height, width)
        top, left = self.padding(height, width)
        rows, columns = (tiles * self.side for tiles in self.grid(height, width))
        return self.per_view + (rows - 2 * top) * (columns - 2 * left + 1)

    def placeholders(self, height: int, width: int) -> int:
        """Image tokens that stand for the image in input_ids."""
        return 1 if self.marks else self.visual(height, width)

    def padding(self, height: int, width: int) -> Size:
        """(rows above and below, columns left and right) of the tiles' grid that hold nothing of the image.

        Rounds as `unpad_image` of transformers does, so an odd rest stays at the lower or right edge, and of an image
        that is thinner than a row nothing may be left.
        """
        rows, columns = (tiles * self.side for tiles in self.grid(height, width))
        if width / height > columns / rows:
            return (rows - int(round(height * (columns / width), 7))) // 2, 0
        return 0, (columns - int(round(width * (rows / height), 7))) // 2

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """RGB image -> its views, all view_size x view_size but where the image is the only one."""
        if self.mode == "none":
            return [image]
        rows, columns = self.grid(image.height, image.width)
        views = LlavaNextImageProcessorPil().get_image_patches(
            np.asarray(shorten(image)).transpose(2, 0, 1),
            [[rows * self.view_size, columns * self.view_size]],
            size=(self.view_size, self.view_size),
            patch_size=self.view_size,
            resample=PILImageResampling.BICUBIC,
        )
        return [Image.fromarray(view.transpose(1, 2, 0)) for view in views]

    def arrange(
        self, views: torch.Tensor, sizes: Sequence[Size] | None, newline: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The connector's vectors in reading order.

        views: [V, per_view, D], those of all images; sizes: of the images, not needed where each is one view; newline:
        [D]. Returns [S, D] and how many of them each image has. ValueError when views and sizes don't match.
        """
        if self.mode == "none":
            return views.flatten(0, 1), (views.shape[1],) * views.shape[0]
        if sizes is None:
            raise ValueError("images that are cut into tiles need their sizes (image_sizes)")
        counts = [self.views(*size) for size in sizes]
        if sum(counts) != views.shape[0]:
            raise ValueError(f"{views.shape[0]} views, but {len(sizes)} images of these sizes need {sum(counts)}")
        images = [self._arrange_one(own, size, newline) for own, size in zip(views.split(counts), sizes, strict=True)]
        return torch.cat(images), tuple(map(len, images))

    def _arrange_one(self, views: torch.Tensor, size: Size, newline: torch.Tensor | None) -> torch.Tensor:
        if self.mode == "tiles":
            return views.flatten(0, 1)
        assert newline is not None
        rows, columns = self.grid(*size)
        grid = views[1:].unflatten(0, (rows, columns)).unflatten(2, (self.side, self.side))
        grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows * side, columns * side, D]
        top, left = self.padding(*size)
        grid = grid[top : grid.shape[0] - top, left : grid.shape[1] - left]
        ends = newline.to(grid.dtype).expand(grid.shape[0], 1, -1)
        return torch.cat([views[0], torch.cat([grid, ends], dim=1).flatten(0, 1)])


def shorten(image: Image.Image) -> Image.Image:
    """An image whose edges can be scaled at no great cost: that takes memory by the longer one, gigabytes where it has
    millions of pixels."""
    return image.reduce((-(-image.width // LONGEST_EDGE), -(-image.height // LONGEST_EDGE)))


def default_pinpoints(view_size: int) -> tuple[Size, ...]:
    """LLaVA-NeXT's grids: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 tiles."""
    return tuple((rows * view_size, columns * view_size) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))


def check_pinpoints(pinpoints: Iterable[Size], view_size: int) -> None:
    for height, width in pinpoints:
        if height % view_size or width % view_size:
            raise ValueError(f"tiling.pinpoints: {height} x {width} can't be cut into tiles of {view_size} pixels")
