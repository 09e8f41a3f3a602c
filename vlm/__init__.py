"""Vision-language models, early (LLaVA) and deep (Flamingo) fusion. Names load on first use, so importing is cheap."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "VisionLanguageConfig": "vlm.configuration",
    "VisionLanguageModel": "vlm.modeling",
    "VisionLanguageProcessor": "vlm.processing",
    "Visual": "vlm.visual",
    "UserError": "vlm.errors",
    "load": "vlm.checkpoint",
    "save": "vlm.checkpoint",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
