"""The vision tower: an encoder of transformers, and which of its hidden states the connector gets."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from vlm.encoders import grid_side


class VisionTower(nn.Module):
    """pixel_values [V, 3, H, W] -> features [V, P, feature_size]. Runs without a graph while all of it is frozen."""

    def __init__(self, config: PreTrainedConfig, feature_layer: int | list[int], select: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(config)
        self.feature_layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        states: int = config.num_hidden_layers + 1
        for layer in self.feature_layers:
            if not -states <= layer < states:
                raise ValueError(f"feature layer {layer}: the encoder has the {states} layers 0 to {states - 1}")
        self.side = grid_side(config)
        self.keep_class_token = select == "cls_patch"
        self.feature_size = config.hidden_size * len(self.feature_layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        patches = self.side**2
        hidden_states = self._encode(pixel_values)
        features = torch.cat([hidden_states[layer] for layer in self.feature_layers], dim=-1)
        if not self.keep_class_token:
            return features[:, -patches:]  # what stands before them is a class token, registers, or nothing
        if features.shape[1] != patches + 1:
            before = features.shape[1] - patches
            raise ValueError(f"feature selection 'cls_patch' needs one class token, and this encoder has {before}")
        return features

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.encoder.config.model_type != "siglip2_vision_model":
            out = self.encoder(pixel_values, output_hidden_states=True)
            return tuple(out.hidden_states)
        # SigLIP 2's NaFlex encoder takes patches, colours innermost, and the grid that they form
        size = self.encoder.config.patch_size
        cut = pixel_values.unfold(2, size, size).unfold(3, size, size)  # [V, 3, rows, columns, size, size]
        out = self.encoder(
            cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2),
            pixel_attention_mask=None,
            spatial_shapes=torch.tensor([[self.side, self.side]] * len(pixel_values), device="cpu"),
            output_hidden_states=True,
        )
        return tuple(out.hidden_states)


def merge_towers(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[V, P, D1] and [V, Q, D2] patches of square grids -> [V, P, D1 + D2], the second grid resized to the first's."""
    side, other = (round(features.shape[1] ** 0.5) for features in (first, second))
    if side != other:
        grid = second.transpose(1, 2).unflatten(2, (other, other))
        grid = nn.functional.interpolate(grid.float(), size=(side, side), mode="bilinear").to(second.dtype)
        second = grid.flatten(2).transpose(1, 2)
    return torch.cat([first, second.to(first.dtype)], dim=-1)
