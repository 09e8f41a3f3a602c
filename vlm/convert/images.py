"""Preprocessing settings of other folders: whichever class wrote them, the same values in a class of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from transformers import (
    BaseImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)

from vlm.convert.sources import read_settings
from vlm.errors import UserError

# the class's name without what says how it computes (Fast, Pil) -> the one that needs nothing but Pillow
CLASSES: dict[str, type[Any]] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "CLIPFeatureExtractor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    # its tiles are cut by our tiling, and then treated as CLIP treats an image
    "LlavaNextImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}
# written beside the settings by one version or another, and no setting of how an image is changed
BESIDE = (
    "image_processor_type feature_extractor_type processor_class _valid_processor_keys data_format input_data_format "
    "device disable_grouping return_tensors default_to_square image_seq_length num_additional_image_tokens patch_size "
    "image_grid_pinpoints aspect_ratio_setting do_pad pad_size"
).split()
NEEDS_PADDING = "LlavaImageProcessor"


def read_image_settings(folder: Path) -> dict[str, Any]:
    """What a folder says about preprocessing, from whichever file it keeps it in."""
    if (folder / "preprocessor_config.json").is_file():
        return read_settings(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        nested = read_settings(folder / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise UserError(f"{folder}: nothing in it says how images are prepared (preprocessor_config.json)")


def image_processor(settings: Mapping[str, Any], where: str) -> BaseImageProcessor:
    """A processor with these values. UserError for a class or a setting that is unknown here, and would be lost."""
    written = str(
        settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor"
    )
    name = written.removesuffix("Fast").removesuffix("Pil")
    if name not in CLASSES:
        raise UserError(
            f"{where}: images are prepared by {written}, which is unknown here; {', '.join(CLASSES)} are known"
        )
    kind = CLASSES[name]
    known = get_type_hints(kind.valid_kwargs)
    values = {key: value for key, value in settings.items() if key not in BESIDE and value is not None}
    if name == NEEDS_PADDING:
        values["do_pad"] = bool(settings.get("do_pad", False))
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"{where}: unknown image settings {', '.join(unknown)}")
    made: BaseImageProcessor = kind(**values)
    return made
