"""What can be known of a recipe before it runs: every stage is built without weights, before anything is written."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPTextConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data.bad import Bad, summarise
from data.check_report import listed_keys
from data.streams import Item, Stream, spread
from train.adapters import add_lora, target_modules
from train.build import clip_settings, encoder_config, fused_config, image_settings, language_config, open_sources
from train.parts import split_into_parts
from train.recipe import Backbone, Model, Recipe, Stage
from vlm.checkpoint import ADAPTER_CONFIG, check_source
from vlm.configuration import VisionLanguageConfig, context_length
from vlm.contrastive import make_clip
from vlm.encoders import IMAGE_PROCESSORS, check_encoder, image_size, make_image_processor
from vlm.errors import UserError
from vlm.hub import fetch
from vlm.modeling import VisionLanguageModel
from vlm.settings import nearest

LOOKED_AT = 20_000  # rows of a stage that are read before it begins
FIRST_OF_STREAM = 20
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# transformers takes these beside a configuration's own fields
EXTRA = {"attn_implementation"}
ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def check_recipe(recipe: Recipe) -> None:
    """UserError for settings, parts, layers and folders that a stage of the recipe asks for in vain."""
    _check_names(recipe.model)
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        with torch.device("meta"):
            model = _network(recipe, stage)
            with _blame(where):
                if stage.reset:
                    target_modules(model, stage.reset, f"{where}.reset")
                if stage.lora:
                    target_modules(model, stage.lora.targets, f"{where}.lora.targets")
                    add_lora(model, stage.lora)
        split_into_parts(model, stage)


def check_processes(recipe: Recipe, processes: int) -> None:
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        if stage.batch_size % processes:
            raise UserError(f"{where}.batch_size: {stage.batch_size} can't be shared by {processes} processes")
        if stage.objective == "contrastive" and processes > 1:
            raise UserError(f"{where}: a contrastive batch can't be shared by {processes} processes; start only one")


@dataclass
class RowsRead:
    """What was read of a stage's rows before it begins: how many of how many (None: a stream), those of them without a
    picture, and how many have each key that nothing is read from."""

    stage: str
    rows: int | None
    read: int = 0
    pictureless: int = 0
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item) -> None:
        if isinstance(item, Bad):
            return
        self.read += 1
        self.pictureless += not item.images
        self.ignored.update(item.ignored)

    def __str__(self) -> str:
        of = f" of {self.rows:,}" if self.rows is not None and self.read < self.rows else ""
        told = f"stage {self.stage}: {self.read:,} sound rows read first{of}, {self.pictureless:,} without a picture"
        keys = dict(self.ignored.most_common())
        return told + (f"; ignored columns: {listed_keys(keys)}" if keys else "")


def check_rows(recipe: Recipe, stage: Stage) -> RowsRead:
    """Reads rows spread evenly over the data of a stage, all of them where there are few, and says what they hold.

    UserError when more of them are broken than the recipe allows, for fewer rows than a group has, and for a stream
    whose share can't be told.
    """
    sources = open_sources(recipe, stage)
    numbered = [source for source in sources if not isinstance(source, Stream)]
    rows = sum(map(len, numbered))
    if numbered == sources and stage.group > rows:
        raise UserError(f"stages.{stage.name}.group: {stage.group} rows can't be neighbours where there are {rows}")
    for data, source in zip(stage.data, sources, strict=True):
        if isinstance(source, Stream) and data.rows is None and (len(sources) > 1 or stage.epochs):
            raise UserError(f"{data.path}: a stream doesn't say how long it is; give `rows`, how many an epoch has")
    images = {"contrastive": 1, "language": 0}.get(stage.objective)
    broken: list[Bad] = []
    looked = 0
    told = RowsRead(stage.name, rows if numbered == sources else None)
    for source in sources:
        share = FIRST_OF_STREAM if isinstance(source, Stream) else max(1, LOOKED_AT * len(source) // max(rows, 1))
        found = []
        for item in spread(source, share):
            found.append(_broken(item, images))
            told.add(item)
        if isinstance(source, Stream) and None in found:
            continue  # so few rows say nothing of a share
        looked += len(found)
        broken += [bad for bad in found if bad is not None]
    if len(broken) > recipe.max_bad * looked:
        raise UserError(
            f"stages.{stage.name}: {len(broken)} of {looked} rows are broken, more than max_bad ({recipe.max_bad:.3g}) "
            f"allows ({summarise(broken)}); `vlm data check` lists all"
        )
    return told


def tell_rows(rows: RowsRead, aloud: bool) -> None:
    if aloud:
        print(rows, file=sys.stderr, flush=True)


def _broken(item: Item, images: int | None) -> Bad | None:
    if isinstance(item, Bad):
        return item
    if images == 1 and item.kind == "document":
        return Bad(item.where, "a document, where the stage takes images with captions")
    if images is None or len(item.images) == images:
        return None
    return Bad(item.where, f"has {len(item.images)} images, where the stage takes {images}")


def _check_names(spec: Model) -> None:
    if spec.vision.config is not None:
        _check_encoder("model.vision.config", spec.vision.config)
    if spec.second_vision is not None and spec.second_vision.config is not None:
        _check_encoder("model.second_vision.config", spec.second_vision.config)
    if spec.text_tower is not None:
        _check_fields("model.text_tower", spec.text_tower, CLIPTextConfig)
    if spec.language.config is not None:
        kind = str(spec.language.config.get("model_type", "llama"))
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
            near = nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
            raise UserError(f"model.language.config.model_type: no language model is called {kind!r}; {near}")
        _check_fields("model.language.config", spec.language.config, CONFIG_MAPPING[kind])


def _check_encoder(where: str, settings: dict[str, Any]) -> None:
    kind = str(settings.get("model_type", "clip_vision_model"))
    if kind not in IMAGE_PROCESSORS:
        raise UserError(f"{where}.model_type: no vision encoder is called {kind!r}; {nearest(kind, IMAGE_PROCESSORS)}")
    _check_fields(where, settings, CONFIG_MAPPING[kind])


def _check_fields(where: str, settings: dict[str, Any], kind: type[PreTrainedConfig]) -> None:
    """transformers takes any setting, and goes on without the one that was meant."""
    if settings.get("model_type", kind.model_type) != kind.model_type:
        raise UserError(f"{where}.model_type: has to be {kind.model_type!r}; other kinds come by pretrained")
    known = {field.name for field in fields(kind) if field.init} | set(kind.attribute_map) | EXTRA | {"model_type"}
    known |= ROPE if "rope_parameters" in known else set()
    for name in settings:
        if name not in known:
            raise UserError(f"{where}.{name}: unknown setting; {nearest(name, known)}")


def _network(recipe: Recipe, stage: Stage) -> Any:
    """The network of a stage without its weights."""
    spec = recipe.model
    if stage.objective == "contrastive":
        vision, text = clip_settings(spec)
        with _blame("model.vision.config or model.text_tower"):
            clip = make_clip(vision, {**NO_IDS, **text}, spec.projection_dim)
        _check_pictures("model.image", clip.config.vision_config, spec.image)
        return clip
    if spec.pretrained is not None and stage.objective == "chat":
        config = _saved_config(spec.pretrained)
    else:
        with _blame("model.language"):
            language = language_config(spec.language, **NO_IDS)
            if language.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                kind = language.model_type
                raise UserError(f"{spec.language.pretrained}: a {kind!r} model, where a language model is needed")
            model = AutoModelForCausalLM.from_config(language)
        if stage.objective == "language":
            _check_context(recipe, language)
            return model
        encoder, second = _encoder("model.vision", spec.vision), None
        _check_pictures("model.image", encoder, image_settings(spec.vision, encoder, spec.image))
        if spec.second_vision is not None:
            second = _encoder("model.second_vision", spec.second_vision)
            own = image_settings(spec.second_vision, second, spec.second_image)
            _check_pictures("model.second_image", second, own)
        with _blame("model"):
            config = fused_config(spec, encoder, language, 0, second)
    _check_context(recipe, config.text_config)
    with _blame("model"):
        fused = VisionLanguageModel(config)
        _encode_a_picture(fused)
    return fused


def _encoder(where: str, backbone: Backbone) -> PreTrainedConfig:
    with _blame(where):
        config = encoder_config(backbone)
        if backbone.pretrained is not None and config.model_type not in IMAGE_PROCESSORS:
            raise UserError(f"{backbone.pretrained}: a {config.model_type!r} model, where an encoder is needed")
        check_encoder(config)
        return config


def _encode_a_picture(model: VisionLanguageModel) -> None:
    tokens, second = model.config.image_tokens, model.config.second_vision_config
    views = tokens.views(tokens.view_size, tokens.view_size)
    first, other = (
        torch.empty(views, 3, edge, edge) for edge in (tokens.view_size, image_size(second) if second else 0)
    )
    sizes = torch.tensor([[tokens.view_size, tokens.view_size]], device="cpu")
    model.encode_images(first, sizes, other if second else None)


def _saved_config(source: str) -> VisionLanguageConfig:
    folder = fetch(source)
    if (folder / ADAPTER_CONFIG).is_file():
        from peft import PeftConfig

        folder = fetch(str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path))
    check_source(folder, model_type="vlm")
    with _blame("model.pretrained"):
        config: VisionLanguageConfig = VisionLanguageConfig.from_pretrained(folder)
    return config


def _check_context(recipe: Recipe, language: Any) -> None:
    longest = context_length(language)
    if recipe.context is None and longest is None:
        raise UserError("context: the language model names no longest one of its own; give it")
    if recipe.context is not None and longest is not None and recipe.context > longest:
        raise UserError(f"context: {recipe.context} is more than the {longest} tokens that the language model can read")


def _check_pictures(where: str, encoder: Any, settings: dict[str, Any]) -> None:
    """The image processor makes what the encoder takes, of a picture that isn't square."""
    with _blame(where), torch.device("cpu"):
        size = image_size(encoder)
        processor: Any = make_image_processor(encoder, settings)
        made = processor([Image.new("RGB", (3 * size, 2 * size))], return_tensors="np")["pixel_values"][0].shape
    if tuple(made) != (3, size, size):
        raise UserError(f"{where}: makes pictures of the shape {made}, and the encoder takes (3, {size}, {size})")


@contextmanager
def _blame(where: str) -> Iterator[None]:
    """transformers fails in many ways on settings that don't fit together; this names the place, on one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
