"""A saved tokenizer that every version of transformers reads as it is."""

import json
from pathlib import Path

# of how and where a tokenizer was loaded; the chat template has files of its own
LEFT_OUT = ("chat_template", "backend", "is_local", "local_files_only")


def pin_tokenizer(folder: Path, processor_class: str) -> None:
    """Rewrites tokenizer_config.json so that tokenizer.json alone decides about tokens.

    Classes of model families build their tokenizers anew when they are loaded, from settings that saving may lose
    (Llama's `legacy`), and in each version in another way. transformers 4.x knows neither 5.x's own class nor its lists
    of special tokens; 5.x reads the old names, too.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in LEFT_OUT:
        settings.pop(name, None)
    settings |= {"processor_class": processor_class, "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
