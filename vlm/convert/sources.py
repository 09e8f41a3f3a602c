"""What else lies in a model folder: settings, tokenizer, chat template. Code in it is never run."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from vlm.checkpoint import asks_for_code, read_object
from vlm.errors import UserError, first_line
from vlm.templates import fit_template, read_template

NEEDED_BY_SLOW = ("sentencepiece", "google.protobuf")


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. UserError when there is none, or when it asks to run code."""
    if not path.is_file():
        raise UserError(f"{path.parent}: not a model folder (no {path.name} in it)")
    content = read_object(path)
    if asks_for_code(content):
        raise UserError(
            f"{path.parent}: its {path.name} asks to run code from the folder (auto_map); that is never done"
        )
    return content


def read_tokenizer(folder: Path, language_model: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a slow one (tokenizer.model) converted. Code in the folder is never run.

    language_model: whose tokenizer it is, where the folder's own config.json is another model's: the family decides how
    a slow one is converted.
    """
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        read_settings(settings)
    only_slow = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_slow and (lacking := [name for name in NEEDED_BY_SLOW if not _installed(name)]):
        raise UserError(f"{folder}: reading its tokenizer.model needs {lacking[0]}: pip install 'vlm[sentencepiece]'")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=language_model, trust_remote_code=False
        )
    except Exception as error:  # transformers fails in many ways on broken folders
        raise UserError(f"{folder}: its tokenizer can't be loaded ({first_line(error)})") from error
    return tokenizer


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def read_chat_template(
    folder: Path, tokenizer: PreTrainedTokenizerBase, given: Path | None, image_token: str
) -> str | None:
    """The chat template, fitted (vlm.templates): of the file that was named, or else the folder's own, or None where it
    has none. UserError for one that renders nothing."""
    if given is not None:
        return _fitted(read_template(given), tokenizer, image_token, given)
    own: Any = tokenizer.chat_template
    if (folder / "chat_template.jinja").is_file():
        own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        own = read_settings(folder / "chat_template.json").get("chat_template") or own
    return _fitted(own, tokenizer, image_token, folder) if isinstance(own, str) else None


def _fitted(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str, where: Path) -> str:
    if not template.strip():
        raise UserError(f"{where}: the chat template is empty; give one with --chat-template FILE")
    try:
        return fit_template(template, tokenizer, image_token)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def refuse_quantised(written: Mapping[str, Any], where: str) -> None:
    """UserError for packed weights: they would have to be unpacked before anything can be made of them."""
    if settings := written.get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise UserError(f"{where}: its weights are quantised ({method}); import the model that it was made of")


def check_target(out: Path) -> None:
    """UserError when something lies there already: it would be replaced as a whole."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; use another --out")
