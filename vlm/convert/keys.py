"""Names of tensors: one table between transformers' LLaVA and ours, read in both directions."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from vlm.configuration import VisionLanguageConfig
from vlm.convert.tensors import Shape, Tensors
from vlm.errors import UserError
from vlm.modeling import VisionLanguageModel

# Ours, and how LLaVA's files spell it: first what we write (transformers 4.x; vLLM and transformers 5 read it, too),
# then what transformers 5 keeps in memory, and what it writes. Longer spellings stand before their own beginnings.
# {base} and {head}: the causal LM's own names for its decoder ("model" in most) and its output layer ("lm_head").
TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vision_tower.encoder.", ("vision_tower.vision_model.", "model.vision_tower.vision_model.")),
    ("vision_tower.encoder.", ("vision_tower.", "model.vision_tower.")),
    ("multi_modal_projector.layers.0.", ("multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_1.")),
    ("multi_modal_projector.layers.2.", ("multi_modal_projector.linear_2.", "model.multi_modal_projector.linear_2.")),
    ("image_newline", ("image_newline", "model.image_newline")),
    ("language_model.{head}.", ("language_model.lm_head.", "lm_head.")),
    ("language_model.{base}.", ("language_model.model.", "model.language_model.")),
)
# Encoders that transformers 4.x keeps below a `vision_model`.
WRAPPED_ENCODERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
# Constants that old versions saved: made anew by every model, so nothing is lost with them.
CONSTANTS = ("position_ids", "rotary_emb.inv_freq", "masked_bias", "attn.bias")
LISTED = 5


@dataclass(frozen=True)
class Skeleton:
    """What a model of ours consists of, without any of its numbers: built on the meta device.

    shapes: of every tensor that a folder must hold, under the name it has in files; tied: names that are another
    tensor's, and not saved; base, head: the LM's own names (in files) for its decoder and its output layer.
    """

    shapes: dict[str, Shape]
    tied: dict[str, str]
    base: str
    head: str


def skeleton(config: VisionLanguageConfig) -> Skeleton:
    """UserError when no model can be built from the configuration."""
    try:
        with torch.device("meta"):
            model = VisionLanguageModel(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"no model can be built from this configuration ({error})") from error
    tied = {str(copy): str(owner) for copy, owner in dict(model.all_tied_weights_keys).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in file_tensors(model).items()}
    language_model: Any = model.language_model
    output = language_model.get_output_embeddings()
    head = next(name for name, module in language_model.named_modules() if module is output)
    (in_files,) = revert_weight_conversion(model, {f"language_model.{head}.weight": output.weight})
    head = in_files.removeprefix("language_model.").removesuffix(".weight")
    return Skeleton(shapes, tied, language_model.base_model_prefix, head)


def file_tensors(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """A model's tensors under the names that they have in files, each once: transformers renames some on their way."""
    model.__dict__.pop(
        "_weight_conversions", None
    )  # those by which it was read; quantised files have some of their own
    tied = set(model.all_tied_weights_keys)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return dict(revert_weight_conversion(model, own))


def from_llava(name: str, frame: Skeleton) -> str:
    """Our name of a tensor of a LLaVA file; one that LLaVA doesn't know is returned as it is.

    Early 4.x kept a whole causal LM in LLaVA, with that LM's own names.
    """
    if name.startswith("language_model.") and name in frame.shapes:
        return name
    for ours, spellings in TABLE:
        for spelling in spellings:
            if name.startswith(spelling):
                return ours.format(base=frame.base, head=frame.head) + name.removeprefix(spelling)
    return name


def to_llava(name: str, frame: Skeleton, encoder: str) -> str:
    """The name that we write into a LLaVA folder. UserError for a tensor that LLaVA has no place for."""
    for ours, spellings in TABLE:
        prefix = ours.format(base=frame.base, head=frame.head)
        if name.startswith(prefix) and ("vision_model." not in spellings[0] or encoder in WRAPPED_ENCODERS):
            return spellings[0] + name.removeprefix(prefix)
    raise UserError(f"LLaVA has no place for {name}; use --to vlm")


def match(source: Tensors, names: Mapping[str, str], frame: Skeleton, where: str) -> dict[str, str]:
    """Our name -> the source's, for every tensor that the model needs. `names`: the source's name -> ours.

    UserError listing what is missing, unexpected, doubled or of another shape. Known constants are left out.
    """
    found: dict[str, str] = {}
    for theirs, ours in names.items():
        if ours in found:
            raise UserError(f"{where}: {theirs} and {found[ours]} are the same tensor, {ours}")
        found[ours] = theirs
    problems = []
    if missing := [name for name in frame.shapes if name not in found]:
        problems.append(_listed("missing", missing))
    known = {*frame.shapes, *frame.tied}
    if unexpected := [theirs for ours, theirs in found.items() if ours not in known and not is_constant(theirs)]:
        problems.append(_listed("unexpected", unexpected))
    misshaped = [
        f"{found[ours]} is {_size(source.shapes[found[ours]])} and must be {_size(shape)}"
        for ours, shape in frame.shapes.items()
        if ours in found and source.shapes[found[ours]] != shape
    ]
    if misshaped:
        problems.append(_listed("of another shape", misshaped))
    if problems:
        raise UserError(f"{where}: its tensors don't make up the model of its config.json: {'; '.join(problems)}")
    for copy, owner in frame.tied.items():
        if copy in found and not torch.equal(source.read(found[copy]), source.read(found[owner])):
            raise UserError(
                f"{where}: {found[copy]} differs from {found[owner]}, and the config says that they are one tensor; "
                "set tie_word_embeddings in its config.json to false to keep both"
            )
    return {ours: found[ours] for ours in frame.shapes}


def is_constant(name: str) -> bool:
    return name.endswith(CONSTANTS)


def dropped(source: Tensors, used: Mapping[str, str]) -> list[str]:
    """Names of the source's tensors that are left out."""
    return sorted(set(source.shapes) - set(used.values()))


def _listed(what: str, names: Collection[str]) -> str:
    shown: Iterable[str] = list(names)[:LISTED]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what} ({', '.join(shown)}{more})"


def _size(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a number"
