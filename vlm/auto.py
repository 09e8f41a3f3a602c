"""Importing this module lets transformers' Auto classes find ours."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from vlm.configuration import VisionLanguageConfig
from vlm.modeling import VisionLanguageModel
from vlm.processing import VisionLanguageProcessor


def register() -> None:
    """May be called any number of times."""
    AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig, exist_ok=True)
    AutoModel.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
    AutoModelForImageTextToText.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
    AutoModelForCausalLM.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
    AutoProcessor.register(VisionLanguageConfig, VisionLanguageProcessor, exist_ok=True)


register()
