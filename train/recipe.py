"""`Recipe`: everything that decides what a training run does. YAML files, `a.b=c` overrides, frozen dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data.augment import Augment
from data.encode import TrainOn
from data.key_map import KeyMap, key_map
from data.packing import Packing
from vlm.configuration import Connector, CrossAttention
from vlm.contrastive import POSITION_STD
from vlm.errors import UserError
from vlm.settings import (
    BelowOne,
    Count,
    Natural,
    NotNegative,
    Positive,
    Share,
    apply_overrides,
    nearest,
    parse,
    read_yaml,
)
from vlm.tiling import Tiling
from vlm.tokenization import SMALLEST_VOCABULARY

Seed = Annotated[int, Field(ge=0, le=4_000_000)]  # a stage's is a thousand times as much, and NumPy takes 32 bits

PARTS = {
    "contrastive": ("vision_tower", "text_tower", "projections"),
    "language": ("language_model",),
    "chat": ("vision_tower", "connector", "cross_attention", "gates", "language_model", "lora"),
}


@dataclass(frozen=True)
class Backbone:
    """An encoder or an LM: `pretrained` (a folder or a hub id), or `config` with the fields of its transformers
    configuration for random weights; with `stage`, the stage of this recipe that trains it before it is fused."""

    pretrained: str | None = None
    config: dict[str, Any] | None = None
    stage: str | None = None

    def __post_init__(self) -> None:
        if self.pretrained is not None and self.config is not None:
            raise ValueError("give pretrained or config, not both")


@dataclass(frozen=True)
class Model:
    """What is built. `pretrained` goes on from a saved model; else the parts are put together.

    text_tower: CLIPTextConfig fields of contrastive stages; vision_position_std: deviation of a new encoder's
    positions, large where places matter, .02 where only shapes do; tokenizer_vocab: size of the byte-level tokenizer
    that is made from the recipe's texts when the LM brings none; chat_template: vicuna_v1, plain, chatml, a .jinja file
    or Jinja itself, in place of the LM's own; second_vision: an encoder whose features join the
    first's; image, second_image: settings of their image processors.
    """

    pretrained: str | None = None
    vision: Backbone = field(default_factory=Backbone)
    language: Backbone = field(default_factory=Backbone)
    text_tower: dict[str, Any] | None = None
    projection_dim: Count = 128
    vision_position_std: Positive = POSITION_STD
    tokenizer_vocab: Annotated[int, Field(ge=SMALLEST_VOCABULARY)] = 512
    chat_template: str | None = None
    second_vision: Backbone | None = None
    fusion: Literal["early", "deep"] = "early"
    connector: Connector = field(default_factory=Connector)
    cross_attention: CrossAttention = field(default_factory=CrossAttention)
    feature_layer: int | list[int] = -2
    feature_select: Literal["patch", "cls_patch"] = "patch"
    second_feature_layer: int | list[int] = -2
    tiling: Tiling = field(default_factory=Tiling)
    image: dict[str, Any] = field(default_factory=dict)
    second_image: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.feature_layer == []:
            raise ValueError("feature_layer needs at least one layer")
        if self.pretrained is not None:
            given = [name for name, value in vars(Model()).items() if getattr(self, name) != value]
            if ignored := [name for name in given if name != "pretrained"]:
                raise ValueError(f"pretrained is a whole model and brings its own {', '.join(ignored)}; remove these")


@dataclass(frozen=True)
class Data:
    """A file of rows and the folder of its images (default: `images` beside the file). Relative to data_root.

    format: of the rows, where it can't be found out; stream: read a data set of the hub, or Parquet files, while it
    arrives, in order, and keep nothing (so are tars by http(s) address); weight: how often an epoch has each of its
    rows (.5: half of them, the other half in the next epoch); rows: how many an epoch has, instead of a weight;
    columns: keys of rows by other names, {image: picture, question: q}; image: [left, right]; ignore: [video].
    """

    path: str
    images: str | None = None
    format: str | None = None
    weight: Positive = 1.0
    rows: Count | None = None
    stream: bool = False
    columns: dict[str, str | list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows is not None and self.weight != 1:
            raise ValueError(f"{self.path}: give weight or rows, not both")
        self.key_map  # noqa: B018 (raises for a name that nothing is read by)

    @property
    def key_map(self) -> KeyMap:
        return key_map(self.columns, f"{self.path}: columns")

    def count(self, length: int) -> int:
        """Rows per epoch of a source that has this many."""
        return self.rows or max(1, round(self.weight * length))


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2021) on the LM's linear layers: all of them, or those whose name ends in a target."""

    rank: Count = 16
    alpha: Count | None = None  # default: 2 x rank
    dropout: BelowOne = 0.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stretch of training, of so many optimizer steps or epochs. Parts without a learning rate are frozen.

    batch_size: rows per optimizer step, over all ranks (packed rows, where they are packed); micro_batch_size: rows
    per forward on a rank; warmup: share of the steps; group: rows that stay neighbours when shuffled; train_on: which
    tokens the loss counts; reset: linear layers of the LM, by the last part of their name, that begin the stage with
    new random weights.
    """

    name: str
    objective: Literal["contrastive", "language", "chat"]
    data: tuple[Data, ...]
    learning_rates: dict[str, NotNegative]
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 16
    micro_batch_size: Count | None = None
    lora: Lora | None = None
    reset: tuple[str, ...] = ()
    weight_decay: NotNegative = 0.0
    warmup: Share = 0.04
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: Positive = 1.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    train_on: TrainOn = "assistant"
    packing: Packing = field(default_factory=Packing)
    shuffle: bool = True
    group: Count = 1
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"stage {self.name!r} needs data")
        if self.steps is None and self.epochs is None:
            raise ValueError(f"stage {self.name!r} has neither steps nor epochs; give one of them")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"stage {self.name!r} has both steps ({self.steps}) and epochs ({self.epochs:g}), and only one of them "
                f"can say when it ends; clear the other with stages.{self.name}.steps=null or "
                f"stages.{self.name}.epochs=null"
            )
        if self.packing.mode != "none" and (self.objective == "contrastive" or self.group > 1 or not self.shuffle):
            raise ValueError(
                f"packing.mode {self.packing.mode} puts rows in another order: not for contrastive stages, group or "
                "shuffle: false"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"stage name {self.name!r} can't name a folder")
        known = PARTS[self.objective]
        for part in self.learning_rates:
            if part not in known:
                raise ValueError(
                    f"learning_rates.{part}: no such part of a {self.objective} stage; {nearest(part, known)}"
                )
        if not any(self.learning_rates.values()):
            raise ValueError(f"stage {self.name!r} learns nothing: every learning rate is 0")
        if (self.lora is not None) != bool(self.learning_rates.get("lora")):
            raise ValueError("lora settings and a learning rate for lora go together")
        if self.reset and not (self.objective == "chat" and self.learning_rates.get("language_model")):
            raise ValueError("reset is for chat stages that give language_model a learning rate: nothing else relearns")
        micro = self.micro_batch_size or self.batch_size
        if self.batch_size % micro:
            raise ValueError(f"micro_batch_size {micro} doesn't divide batch_size {self.batch_size}")
        if self.objective == "contrastive" and micro != self.batch_size:
            raise ValueError("a contrastive batch can't be split: its rows are each other's negatives")


@dataclass(frozen=True)
class Recipe:
    """A training run. precision auto: bf16 on CUDA, fp32 elsewhere. threads: CPU threads, kept for exact resume.

    max_bad: share of a stage's rows that may be broken; such rows are left out and listed in quarantine.jsonl.
    """

    model: Model
    stages: tuple[Stage, ...]
    seed: Seed = 0
    data_root: str = "."
    context: Count | None = None  # tokens a row may have; default: the LM's own
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: Count | None = None
    workers: Natural = 0
    image_cache_mb: Natural = 1024
    max_bad: Share = 0.005
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("a recipe needs at least one stage")
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ, got {', '.join(names)}")
        for backbone in (self.model.vision, self.model.second_vision, self.model.language):
            if backbone is not None and backbone.stage is not None and backbone.stage not in names:
                raise ValueError(f"no stage {backbone.stage!r} in this recipe; there are {', '.join(names)}")


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with overrides applied; UserError with the path of what is wrong."""
    settings = apply_overrides(read_yaml(path), overrides or [])
    recipe = parse(Recipe, settings, str(path))
    root = Path(recipe.data_root)
    if not root.is_dir():
        raise UserError(f"{path}: data_root {recipe.data_root!r} is no folder")
    return recipe
