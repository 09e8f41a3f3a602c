"""What a model is, as saved in config.json: an encoder, a connector, a causal LM and how they are fused."""

from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2CLS

from vlm.settings import Count, NotNegative, nearest, parse


@dataclass(frozen=True)
class Connector:
    """From the encoder's patches to what the LM sees.

    Both take the patches one by one or in squares of `pool` x `pool`, averaged or put side by side ("concat", as
    Qwen2-VL merges them, section 2.1). mlp: `depth` linear layers with `activation` between (depth 1 is a linear
    projector). perceiver: `num_latents` learned queries over `depth` layers (Flamingo, section 3.1); squares that are
    put side by side become as wide as a patch first.
    """

    type: Literal["mlp", "perceiver"] = "mlp"
    depth: Count = 2
    activation: str = "gelu"
    pool: Count = 1
    pooling: Literal["average", "concat"] = "average"
    num_latents: Count = 64
    heads: Count = 8
    head_dim: Count = 64
    ff_mult: Count = 4
    position_std: NotNegative = 0.0  # > 0 adds learned positions to the patches, drawn with this deviation

    def __post_init__(self) -> None:
        if self.activation not in ACT2CLS:
            raise ValueError(f"activation {self.activation!r} is unknown; {nearest(self.activation, ACT2CLS)}")


@dataclass(frozen=True)
class CrossAttention:
    """The gated blocks of deep fusion: one before every `every`-th decoder layer (Flamingo, section 3.2)."""

    every: Count = 1
    heads: Count = 8
    head_dim: Count = 64
    ff_mult: Count = 4
    attend: Literal["last", "all"] = "last"
    ffn_without_media: Literal["apply", "zero"] = "apply"


@strict
class VisionLanguageConfig(PreTrainedConfig):
    """Configuration of `VisionLanguageModel`.

    `vision_feature_layer` is an index into the encoder's hidden states (negative from the end), or a list of them to
    be concatenated over channels; `vision_feature_select` keeps the patches or the class token, too.
    """

    model_type = "vlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    fusion: Literal["early", "deep"] = "early"
    connector: dict[str, Any] | None = None
    cross_attention: dict[str, Any] | None = None
    vision_feature_layer: int | list[int] = -2
    vision_feature_select: Literal["patch", "cls_patch"] = "patch"
    image_token_id: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.connector = dict(self.connector or {})
        self.cross_attention = dict(self.cross_attention or {})
        # the LM child ties its own embeddings; the flag is mirrored since generation and saving read it here
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        _ = self.cross_attention_settings
        self._check_pool()

    @property
    def connector_settings(self) -> Connector:
        return parse(Connector, self.connector, "connector")

    @property
    def cross_attention_settings(self) -> CrossAttention:
        return parse(CrossAttention, self.cross_attention, "cross_attention")

    @property
    def patches_per_image(self) -> int:
        """Vectors that the encoder hands to the connector for one image."""
        return self._side**2 + (self.vision_feature_select == "cls_patch")

    @property
    def tokens_per_image(self) -> int:
        """Vectors of one image that the LM sees: the single place where image tokens are counted."""
        settings = self.connector_settings
        return settings.num_latents if settings.type == "perceiver" else self.squares_per_image

    def _check_pool(self) -> None:
        pool = self.connector_settings.pool
        if pool == 1:
            return
        if self.vision_feature_select == "cls_patch":
            raise ValueError(f"connector.pool {pool} takes squares of patches: use vision_feature_select: patch")
        if pool > self._side:
            grid = f"{self._side} x {self._side}"
            raise ValueError(f"connector.pool {pool} is larger than the encoder's grid of {grid} patches")

    @property
    def _side(self) -> int:
        """Patches along an edge of the image."""
        vision: Any = self.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def squares_per_image(self) -> int:
        """Vectors of one image after pooling; what the perceiver's latents read, and what the mlp projects."""
        pool = self.connector_settings.pool
        if pool == 1:
            return self.patches_per_image
        return int(-(-self._side // pool)) ** 2

    @property
    def placeholders_per_image(self) -> int:
        """Image tokens that stand for one image in input_ids: all of its vectors (early), or one mark (deep)."""
        return self.tokens_per_image if self.fusion == "early" else 1


def _sub_config(value: dict[str, Any] | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    settings = dict(value or {})
    name = settings.pop("model_type", default)
    if name not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {name!r}: not a model of the installed transformers")
    config: PreTrainedConfig = CONFIG_MAPPING[name](**settings)
    return config
