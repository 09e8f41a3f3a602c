"""What is known of a vision encoder from its configuration alone: its grid, its image size, its preprocessing."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from transformers import (
    BaseImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    SiglipImageProcessorPil,
)

from vlm.settings import nearest

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# SigLIP 2's checkpoints of a fixed size are of the kind siglip_vision_model; siglip2_vision_model is its NaFlex variant
IMAGE_PROCESSORS: dict[str, type[Any]] = {
    "clip_vision_model": CLIPImageProcessorPil,
    "siglip_vision_model": SiglipImageProcessorPil,
    "siglip2_vision_model": SiglipImageProcessorPil,
    "dinov2": BitImageProcessorPil,
    "dinov2_with_registers": BitImageProcessorPil,
}
FITS = ("crop", "stretch", "pad")


def check_encoder(config: PreTrainedConfig) -> str:
    """The encoder's kind; ValueError for one that is unknown, or takes no square images."""
    if config.model_type not in IMAGE_PROCESSORS:
        kinds = ", ".join(IMAGE_PROCESSORS)
        raise ValueError(f"{config.model_type!r} is no vision encoder that is known here; there are {kinds}")
    grid_side(config)
    return config.model_type


def make_image_processor(config: PreTrainedConfig, settings: Mapping[str, Any]) -> BaseImageProcessor:
    """The preprocessing that the encoder was made for, with `settings` in place of its own.

    Beside the settings of the processor's class there is `fit`, how a picture becomes a square: `crop` keeps its
    middle, `stretch` squeezes it, `pad` surrounds it with the mean colour (as LLaVA 1.5). ValueError for an encoder of
    an unknown kind, and for a setting that would be ignored.
    """
    kind = check_encoder(config)
    settings = dict(settings)
    fit = settings.pop("fit", None)
    if fit not in (None, *FITS):
        raise ValueError(f"fit {fit!r} is unknown; {nearest(str(fit), FITS)}")
    known = get_type_hints(IMAGE_PROCESSORS[kind].valid_kwargs)
    for name in settings:
        if name not in known:
            raise ValueError(f"setting {name!r} is unknown; {nearest(name, known)}")
    edge = image_size(config)
    square = {"height": edge, "width": edge}
    whole = IMAGE_PROCESSORS[kind] is SiglipImageProcessorPil  # it squeezes the whole image into the square
    own: dict[str, Any] = {"size": square} if whole else {"size": {"shortest_edge": edge}, "crop_size": square}
    if kind.startswith("dinov2"):
        own |= IMAGENET
    made: BaseImageProcessor = IMAGE_PROCESSORS[kind](**{**own, **settings})
    if fit is None:
        return made
    keeps_shape = {"size": {"shortest_edge": edge}, "crop_size": square, "do_center_crop": True}
    shape = {"size": square, "do_center_crop": False} if fit == "stretch" else keeps_shape
    if fit != "pad":
        return type(made)(**{**own, **settings, **shape})
    kept = {name: getattr(made, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
    return LlavaImageProcessorPil(**{**kept, **settings, **shape, "do_pad": True})


def restore_image_processor(settings: Mapping[str, Any]) -> BaseImageProcessor:
    """An image processor from what its `to_dict` gave."""
    known = (*IMAGE_PROCESSORS.values(), LlavaImageProcessorPil)
    classes = {kind.__name__.removesuffix("Pil"): kind for kind in known}
    name = str(settings.get("image_processor_type")).removesuffix("Pil")
    if name not in classes:
        raise ValueError(f"an image processor of the kind {name!r}; there are {', '.join(classes)}")
    restored: BaseImageProcessor = classes[name](**settings)
    return restored


def grid_side(config: Any) -> int:
    """Patches along an edge of the image."""
    if config.model_type == "siglip2_vision_model":
        side = round(config.num_patches**0.5)
        if side * side != config.num_patches:
            raise ValueError(f"num_patches {config.num_patches} of the vision encoder is no square number")
        return int(side)
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise ValueError(
            f"the vision encoder takes images of {config.image_size} in patches of {config.patch_size}; only squares "
            "are supported"
        )
    return config.image_size // config.patch_size


def image_size(config: Any) -> int:
    """Pixels along an edge of the image that the encoder takes."""
    if config.model_type == "siglip2_vision_model":
        return grid_side(config) * int(config.patch_size)
    grid_side(config)  # it knows what isn't a square
    return int(config.image_size)
