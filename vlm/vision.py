"""The vision tower: an encoder of transformers, and which of its hidden states the connector gets."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


class VisionTower(nn.Module):
    """pixel_values [I, 3, H, W] -> features [I, P, feature_size]. Runs without a graph while all of it is frozen."""

    def __init__(self, config: PreTrainedConfig, feature_layer: int | list[int], select: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(config)
        self.feature_layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        states: int = config.num_hidden_layers + 1
        for layer in self.feature_layers:
            if not -states <= layer < states:
                raise ValueError(f"feature layer {layer}: the encoder has the {states} layers 0 to {states - 1}")
        self.patches = (config.image_size // config.patch_size) ** 2
        self.keep_class_token = select == "cls_patch"
        self.feature_size = config.hidden_size * len(self.feature_layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.encoder(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([hidden_states[layer] for layer in self.feature_layers], dim=-1)
        if not self.keep_class_token:
            return features[:, -self.patches :]  # what stands before them is a class token, registers, or nothing
        if features.shape[1] != self.patches + 1:
            before = features.shape[1] - self.patches
            raise ValueError(f"feature selection 'cls_patch' needs one class token, and this encoder has {before}")
        return features
