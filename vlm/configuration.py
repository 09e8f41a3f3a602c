"""What a model is, as saved in config.json: an encoder, a connector, a causal LM and how they are fused."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2CLS

from vlm.encoders import check_encoder, grid_side, image_size
from vlm.settings import Count, NotNegative, nearest, parse, plain
from vlm.tiling import ImageTokens, Tiling, check_pinpoints, default_pinpoints


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
    bias: bool = True  # of the mlp's layers
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
    be concatenated over channels; `vision_feature_select` keeps the patches or the class token, too. The patches of a
    second encoder are resized to the first's grid and join them over channels.
    """

    model_type = "vlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "second_vision_config": AutoConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    second_vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    fusion: Literal["early", "deep"] = "early"
    connector: dict[str, Any] | None = None
    cross_attention: dict[str, Any] | None = None
    tiling: dict[str, Any] | None = None
    vision_feature_layer: int | list[int] = -2
    vision_feature_select: Literal["patch", "cls_patch"] = "patch"
    second_vision_feature_layer: int | list[int] = -2
    image_token_id: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model")
        if self.second_vision_config is not None:
            self.second_vision_config = _sub_config(self.second_vision_config, "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.connector = dict(self.connector or {})
        self.cross_attention = dict(self.cross_attention or {})
        tiling = parse(Tiling, dict(self.tiling or {}), "tiling")
        if tiling.mode != "none" and not tiling.pinpoints:
            tiling = replace(tiling, pinpoints=default_pinpoints(image_size(self.vision_config)))
        self.tiling = plain(asdict(tiling))
        # the LM child ties its own embeddings; the flag is mirrored since generation and saving read it here
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        _ = self.cross_attention_settings
        self._check_towers()
        self._check_pool()
        self._check_tiling(tiling)

    @property
    def connector_settings(self) -> Connector:
        return parse(Connector, self.connector, "connector")

    @property
    def cross_attention_settings(self) -> CrossAttention:
        return parse(CrossAttention, self.cross_attention, "cross_attention")

    @property
    def image_tokens(self) -> ImageTokens:
        """How many tokens stand for an image."""
        connector, tiling = self.connector_settings, parse(Tiling, self.tiling, "tiling")
        grids = connector.type == "mlp" and self.vision_feature_select == "patch"
        return ImageTokens(
            per_view=connector.num_latents if connector.type == "perceiver" else self.squares_per_view,
            side=-(-grid_side(self.vision_config) // connector.pool) if grids else 0,
            view_size=image_size(self.vision_config),
            marks=self.fusion == "deep",
            mode=tiling.mode,
            pinpoints=tiling.pinpoints,
        )

    @property
    def squares_per_view(self) -> int:
        """Vectors of one view of an image after pooling: what the mlp projects, and what the perceiver's latents read.

        A square is a patch where nothing is pooled.
        """
        pool, side = self.connector_settings.pool, grid_side(self.vision_config)
        return int(-(-side // pool)) ** 2 + (self.vision_feature_select == "cls_patch")

    def _check_towers(self) -> None:
        if [] in (self.vision_feature_layer, self.second_vision_feature_layer):
            raise ValueError("vision_feature_layer needs at least one layer")
        for config in (self.vision_config, self.second_vision_config):
            if isinstance(config, PreTrainedConfig):
                check_encoder(config)
        if self.second_vision_config is not None and self.vision_feature_select == "cls_patch":
            raise ValueError("two vision encoders are merged patch by patch: use vision_feature_select: patch")

    def _check_pool(self) -> None:
        pool, side = self.connector_settings.pool, grid_side(self.vision_config)
        if pool == 1:
            return
        if self.vision_feature_select == "cls_patch":
            raise ValueError(f"connector.pool {pool} takes squares of patches: use vision_feature_select: patch")
        if pool > side:
            raise ValueError(f"connector.pool {pool} is larger than the encoder's grid of {side} x {side} patches")

    def _check_tiling(self, tiling: Tiling) -> None:
        if tiling.mode == "none":
            return
        check_pinpoints(tiling.pinpoints, image_size(self.vision_config))
        if tiling.mode == "anyres" and not self.image_tokens.side:
            raise ValueError(
                "tiling.mode anyres puts the grids of tiles together: it needs an mlp connector and "
                "vision_feature_select: patch; mode tiles works with all"
            )


def context_length(text_config: Any) -> int | None:
    """Tokens that a language model can read; None where it names no limit."""
    names = ("max_position_embeddings", "max_seq_len")
    found = next((getattr(text_config, name) for name in names if getattr(text_config, name, None)), None)
    return None if found is None else int(found)


def _sub_config(value: dict[str, Any] | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    settings = dict(value or {})
    name = settings.pop("model_type", default)
    if name not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {name!r}: not a model of the installed transformers")
    config: PreTrainedConfig = CONFIG_MAPPING[name](**settings)
    return config
