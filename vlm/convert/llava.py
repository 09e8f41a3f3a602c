"""transformers' LLaVA and LLaVA-NeXT: what their config.json says, as ours, and back."""

from collections.abc import Mapping
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig

from vlm.configuration import VisionLanguageConfig
from vlm.errors import UserError, first_line

CONFIGS: dict[str, type[PreTrainedConfig]] = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
ROPE_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
ONLY_OURS = "transformers' LLaVA can't express {what}; use --to vlm"


def read_config(written: Mapping[str, Any], where: str) -> VisionLanguageConfig:
    """Our configuration of a LLaVA folder's. UserError for what ours can't express."""
    theirs: Any
    try:
        theirs = CONFIGS[written["model_type"]].from_dict(dict(written))
    except Exception as error:  # transformers fails in many ways on broken configurations
        raise UserError(f"{where}: its config.json can't be read ({first_line(error)})") from error
    vision, text = theirs.vision_config, theirs.text_config.to_dict()
    # LLaVA's own flag counts, too; transformers 4.x wrote it beside the LM's or instead of it
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings")) or written.get("tie_word_embeddings") is True
    tiling = None
    if written["model_type"] == "llava_next":
        tiling = {"mode": "anyres", "pinpoints": [list(map(int, pair)) for pair in theirs.image_grid_pinpoints]}
    return build_config(
        where,
        vision_config=vision.to_dict(),
        text_config=text,
        connector={
            "type": "mlp",
            "depth": 2,
            "activation": theirs.projector_hidden_act,
            "bias": bool(theirs.multimodal_projector_bias),
        },
        tiling=tiling,
        vision_feature_layer=theirs.vision_feature_layer,
        vision_feature_select=_read_selection(theirs.vision_feature_select_strategy, vision, where),
        image_token_id=theirs.image_token_id,
        dtype=written.get("dtype") or written.get("torch_dtype"),
    )


def build_config(where: str, **settings: Any) -> VisionLanguageConfig:
    """UserError where the settings don't fit together."""
    try:
        return VisionLanguageConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def leading_tokens(vision: Any) -> int:
    """Vectors that an encoder puts before its patches."""
    if vision.model_type.startswith("siglip"):
        return 0
    return 1 + int(getattr(vision, "num_register_tokens", 0))


def _read_selection(strategy: str, vision: Any, where: str) -> str:
    """LLaVA's `default` drops the first vector, whatever it is; `full` keeps all."""
    selections = {("default", 1): "patch", ("full", 1): "cls_patch", ("full", 0): "patch"}
    leading = leading_tokens(vision)
    if (strategy, leading) not in selections:
        raise UserError(
            f"{where}: vision_feature_select_strategy {strategy!r} with {vision.model_type}, which puts {leading} "
            "vectors before its patches, keeps neither the patches alone nor all; that is not supported"
        )
    return selections[strategy, leading]


def write_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """LLaVA's config.json of our configuration. UserError, which points to --to vlm, for what LLaVA can't express."""
    connector, tokens = config.connector_settings, config.image_tokens
    vision: Any = config.vision_config
    text: Any = config.text_config
    leading = leading_tokens(vision)
    strategies = {("patch", 1): "default", ("patch", 0): "full", ("cls_patch", 1): "full"}
    strategy = strategies.get((config.vision_feature_select, leading))
    obstacles = {
        "deep fusion": config.fusion == "deep",
        f"a {connector.type} connector": connector.type != "mlp",
        f"a projector of {connector.depth} layers": connector.type == "mlp" and connector.depth != 2,
        "pooled patches": connector.pool != 1,
        "a second vision encoder": config.second_vision_config is not None,
        f"tiling mode {tokens.mode}": tokens.mode not in ("none", "anyres"),
        "SigLIP 2's NaFlex encoder": vision.model_type == "siglip2_vision_model",
        f"an encoder with {leading} vectors before its patches": strategy is None,
    }
    if found := [what for what, there in obstacles.items() if there]:
        raise UserError(ONLY_OURS.format(what=" and ".join(found)))
    kind = "llava_next" if tokens.mode == "anyres" else "llava"
    written: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "image_token_index": config.image_token_id,
        "image_seq_length": tokens.per_view,
        "projector_hidden_act": connector.activation,
        "multimodal_projector_bias": connector.bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32",
        "vision_config": _sub_config(vision),
        "text_config": {**_sub_config(text), **_rope_of_4(text)},
    }
    if kind == "llava_next":
        written["image_grid_pinpoints"] = [list(pair) for pair in tokens.pinpoints]
    return written


def _sub_config(config: PreTrainedConfig) -> dict[str, Any]:
    beside = ("_name_or_path", "transformers_version", "architectures")
    return {name: value for name, value in config.to_dict().items() if name not in beside}


def _rope_of_4(text: Any) -> dict[str, Any]:
    """transformers 4.x reads what it must know of the rotary embedding from names of their own."""
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return {}
    theta, share = ROPE_NAMES.get(text.model_type, ("rope_theta", "partial_rotary_factor"))
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    written = {theta: rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        written[share] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") != "default":
        written["rope_scaling"] = scaling
    return written
