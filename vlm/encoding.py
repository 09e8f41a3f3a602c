"""From pixels to what a language model sees: the same for our own models and for those inside other engines."""

import torch
from torch import nn

from vlm.configuration import VisionLanguageConfig
from vlm.projector import LinearLayers, MLPProjector
from vlm.resampler import PerceiverResampler
from vlm.vision import VisionTower, merge_towers
from vlm.visual import Visual


class EncodesImages:
    """For models that have these parts."""

    config: VisionLanguageConfig
    vision_tower: VisionTower
    second_vision_tower: VisionTower | None
    multi_modal_projector: nn.Module
    image_newline: nn.Parameter | None

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
        keys: tuple[str, ...] = (),
    ) -> Visual:
        """The images of the whole batch in the order of their placeholders, as the LM sees them.

        pixel_values: [V, 3, H, W], all views of all images, and those for the second encoder; image_sizes: [I, 2],
        heights and widths, needed where images are cut into tiles. ValueError when views and sizes don't match.
        """
        features = self.vision_tower(pixel_values)
        if self.second_vision_tower is not None:
            if second_pixel_values is None:
                raise ValueError("this model has two vision encoders: give second_pixel_values, too")
            features = merge_towers(features, self.second_vision_tower(second_pixel_values))
        views = self.multi_modal_projector(features.to(next(self.multi_modal_projector.parameters()).dtype))
        layout = self.config.image_tokens
        sizes = None if image_sizes is None else [(int(height), int(width)) for height, width in image_sizes.tolist()]
        tokens, lengths = layout.arrange(views, sizes, self.image_newline)
        tiles = tuple(layout.views(*size) for size in sizes) if sizes else (1,) * len(lengths)
        return Visual(tokens, lengths, tiles=tiles, keys=keys)


def make_connector(
    config: VisionLanguageConfig, in_size: int, out_size: int | None, linear: LinearLayers | None = None
) -> nn.Module:
    """The connector of a configuration. out_size None: a Perceiver's latents keep the encoder's width."""
    settings = config.connector_settings
    if settings.type == "mlp":
        assert out_size is not None
        return MLPProjector(settings, in_size, out_size, linear)
    return PerceiverResampler(settings, in_size, out_size, config.squares_per_view, linear)
