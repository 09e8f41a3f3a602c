"""From a recipe to the networks of a stage: from random weights, from saved parts, or from the stage before."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.bad import Bad
from data.sources import Source, open_data
from data.streams import Stream, spread
from train.recipe import Backbone, Model, Recipe, Stage
from train.runs import Run
from vlm.checkpoint import check_complete, check_source, load, written_aside
from vlm.configuration import VisionLanguageConfig
from vlm.contrastive import make_clip
from vlm.convert.images import read_image_settings
from vlm.convert.sources import read_tokenizer
from vlm.encoders import IMAGE_PROCESSORS, image_size, make_image_processor
from vlm.errors import UserError
from vlm.hub import PICKLES, SETTINGS, fetch
from vlm.modeling import VisionLanguageModel
from vlm.processing import VisionLanguageProcessor, make_processor
from vlm.settings import plain
from vlm.templates import VICUNA, find_template, fit_template
from vlm.tiling import ImageTokens
from vlm.tokenization import IMAGE_TOKEN, add_image_token, fill_padding_token, train_tokenizer

IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
KEPT = "image_mean image_std resample rescale_factor do_resize do_rescale do_normalize do_center_crop".split()
TOKENIZER_ROWS = 5000  # rows that a new tokenizer is made from, spread evenly over the data


def open_sources(recipe: Recipe, stage: Stage) -> list[Source | Stream]:
    root = Path(recipe.data_root)
    return [
        open_data(data.path, root, root / data.images if data.images else None, data.format, data.stream, data.key_map)
        for data in stage.data
    ]


def find_tokenizer(recipe: Recipe, run: Run) -> PreTrainedTokenizerBase:
    """The LM's tokenizer, or one made from the recipe's texts; kept in the run, so a resumed run has the same."""
    if not (run.tokenizer / "tokenizer.json").is_file():
        pretrained = recipe.model.language.pretrained
        if pretrained is not None:
            tokenizer = read_tokenizer(fetch(pretrained, *SETTINGS))
            add_image_token(tokenizer)
            fill_padding_token(tokenizer)
            if recipe.model.chat_template is None:
                tokenizer.chat_template = fit_template(tokenizer.chat_template or VICUNA, tokenizer, IMAGE_TOKEN)
        else:
            context = (recipe.model.language.config or {}).get("max_position_embeddings", 2048)
            tokenizer = train_tokenizer(_texts(recipe), recipe.model.tokenizer_vocab, context)
        if recipe.model.chat_template is not None:
            template = find_template(recipe.model.chat_template)
            tokenizer.chat_template = fit_template(template, tokenizer, IMAGE_TOKEN)
        with written_aside(run.tokenizer) as partial:
            tokenizer.save_pretrained(partial)
    loaded = read_tokenizer(run.tokenizer)
    towers = {"model.language.config": recipe.model.language.config, "model.text_tower": recipe.model.text_tower}
    for where, settings in towers.items():
        size = (settings or {}).get("vocab_size", len(loaded))
        if size < len(loaded):
            raise UserError(f"{where}.vocab_size: {size} is less than the tokenizer's {len(loaded)}; leave it out")
    return loaded


def build_clip(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP whose vision tower is the recipe's encoder and whose text tower reads the recipe's tokenizer."""
    vision, text = clip_settings(recipe.model)
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|assistant|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 77,
        **text,
    }
    return make_clip(vision, text, recipe.model.projection_dim, recipe.model.vision_position_std)


def clip_settings(spec: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of both towers."""
    if spec.vision.config is None or spec.text_tower is None:
        raise UserError("a contrastive stage needs model.vision.config and model.text_tower")
    return spec.vision.config, spec.text_tower


def build_language_model(backbone: Backbone, tokenizer: PreTrainedTokenizerBase, run: Run) -> PreTrainedModel:
    """A causal LM with at least as many embeddings as the tokenizer has tokens."""
    pretrained = _trained(backbone, run)
    if pretrained is not None:
        model = _load(AutoModelForCausalLM, pretrained)
        if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer))
        return model
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = language_config(backbone, vocab_size=len(tokenizer), **ids)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return built


def build_encoder(backbone: Backbone, run: Run) -> PreTrainedModel:
    """A vision encoder; of a saved CLIP the vision half."""
    pretrained = _trained(backbone, run)
    if pretrained is not None:
        model = _load(AutoModel, pretrained)
        encoder: PreTrainedModel = getattr(model, "vision_model", model)
        return encoder
    built: PreTrainedModel = AutoModel.from_config(encoder_config(backbone))
    return built


def language_config(backbone: Backbone, **defaults: Any) -> PreTrainedConfig:
    """The configuration of the recipe's LM; `defaults` are for what a `config` leaves out."""
    if backbone.pretrained is not None:
        return _read_config(backbone.pretrained)
    if backbone.config is None:
        raise UserError("model.language needs pretrained or config")
    settings = dict(backbone.config)
    config: PreTrainedConfig = CONFIG_MAPPING[settings.pop("model_type", "llama")](**{**defaults, **settings})
    return config


def encoder_config(backbone: Backbone) -> PreTrainedConfig:
    """The configuration of the recipe's encoder; of a saved CLIP's the vision half."""
    if backbone.pretrained is not None:
        config = _read_config(backbone.pretrained)
        half: PreTrainedConfig = getattr(config, "vision_config", config)
        return half
    if backbone.config is None:
        raise UserError("model.vision needs pretrained or config")
    settings = dict(backbone.config)
    made: PreTrainedConfig = CONFIG_MAPPING[settings.pop("model_type", "clip_vision_model")](**settings)
    return made


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, run: Run
) -> tuple[VisionLanguageModel, VisionLanguageProcessor]:
    """The vision-language model that the first chat stage starts from."""
    spec = recipe.model
    if spec.pretrained is not None:
        return load(spec.pretrained, dtype=torch.float32)
    encoder = build_encoder(spec.vision, run)
    language_model = build_language_model(spec.language, tokenizer, run)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    second = build_encoder(spec.second_vision, run) if spec.second_vision is not None else None
    config = fused_config(
        spec, encoder.config, language_model.config, image_token, second.config if second is not None else None
    )
    model = VisionLanguageModel(config)
    model.vision_tower.encoder.load_state_dict(encoder.state_dict())
    if second is not None:
        assert model.second_vision_tower is not None
        model.second_vision_tower.encoder.load_state_dict(second.state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    processor = make_processor(
        config,
        tokenizer,
        image_settings(spec.vision, encoder.config, spec.image),
        image_settings(spec.second_vision, second.config, spec.second_image) if spec.second_vision and second else None,
    )
    model.generation_config.eos_token_id = _ends(language_model, processor)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def _ends(language_model: PreTrainedModel, processor: VisionLanguageProcessor) -> int | list[int]:
    """What ends an answer: for the language model itself, for its tokenizer, and for the chat template."""
    assert language_model.generation_config is not None
    known = language_model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens = processor.chat.encode(chat)
    said = [token for token, learned in zip(tokens.input_ids, tokens.supervised, strict=True) if learned]
    taught = [token for token in said if token in processor.tokenizer.added_tokens_decoder]
    found = list(
        dict.fromkeys(token for token in [*ends, processor.tokenizer.eos_token_id, *taught] if token is not None)
    )
    return found[0] if len(found) == 1 else found


def fused_config(
    spec: Model,
    vision: PreTrainedConfig,
    language: PreTrainedConfig,
    image_token: int,
    second_vision: PreTrainedConfig | None = None,
) -> VisionLanguageConfig:
    return VisionLanguageConfig(
        vision_config=vision,
        second_vision_config=second_vision,
        text_config=language,
        fusion=spec.fusion,
        connector=plain(vars(spec.connector)),
        cross_attention=plain(vars(spec.cross_attention)) if spec.fusion == "deep" else None,
        vision_feature_layer=spec.feature_layer,
        vision_feature_select=spec.feature_select,
        second_vision_feature_layer=spec.second_feature_layer,
        tiling=plain(vars(spec.tiling)),
        image_token_id=image_token,
    )


def clip_processor(spec: Model, vision: Any, tokenizer: PreTrainedTokenizerBase) -> VisionLanguageProcessor:
    """What a contrastive stage prepares its pictures with."""
    return VisionLanguageProcessor(
        image_processor=make_image_processor(vision, spec.image),
        tokenizer=tokenizer,
        image_tokens=ImageTokens(per_view=1, side=0, view_size=image_size(vision)),
    )


def image_settings(backbone: Backbone, encoder: PreTrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """Of an encoder's image processor: what a saved encoder brings, and over it what the recipe says.

    How large pictures are is up to the encoder: some folders name a smaller crop than they were made for.
    """
    folder = fetch(backbone.pretrained, *SETTINGS) if backbone.pretrained is not None else None
    if folder is None or not any((folder / name).is_file() for name in IMAGE_SETTINGS):
        return dict(own)
    saved, edge = read_image_settings(folder), image_size(encoder)
    settings = {name: saved[name] for name in KEPT if saved.get(name) is not None}
    if "height" in (saved.get("size") or {}):  # the whole picture is squeezed into a square
        settings["size"] = {"height": edge, "width": edge}
    known = get_type_hints(IMAGE_PROCESSORS[encoder.model_type].valid_kwargs)
    return {**{name: value for name, value in settings.items() if name in known}, **own}


def _trained(backbone: Backbone, run: Run) -> str | Path | None:
    """Where its weights are; a stage's folder once that stage is done."""
    if backbone.stage is not None and (run.stage(backbone.stage) / "config.json").is_file():
        return run.stage(backbone.stage)
    return backbone.pretrained


def _load(kind: Any, source: str | Path) -> PreTrainedModel:
    """A backbone with its weights; where there is only a pickle of them, nothing but tensors is read from it."""
    folder = _backbone(source)
    model: PreTrainedModel
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=_is_safe(folder),
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{source}: cannot be loaded ({' '.join(str(error).split())})") from error
    check_complete(source, report)
    return model


def _read_config(source: str) -> PreTrainedConfig:
    folder = _backbone(source)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be loaded ({' '.join(str(error).split())})") from error
    return config


def _backbone(source: str | Path) -> Path:
    """Its folder."""
    folder = fetch(source)
    if not _is_safe(folder):
        folder = fetch(source, *SETTINGS, *PICKLES)
    check_source(folder, pickles=True)
    return folder


def _is_safe(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _texts(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        for source in open_sources(recipe, stage):
            for item in spread(source, TOKENIZER_ROWS):
                if isinstance(item, Bad):  # counted and named where rows are learned from
                    continue
                yield from item.captions
                for message in item.messages:
                    yield from (part["text"] for part in message["content"] if part["type"] == "text")
