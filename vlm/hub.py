"""A model by its name: a local folder, or one downloaded from the hub first, so that the same doors are shut."""

from pathlib import Path

from vlm.errors import UserError, first_line

SETTINGS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
WEIGHTS = ["*.safetensors"]
PICKLES = ["*.bin", "*.pt"]


def fetch(source: str | Path, *patterns: str) -> Path:
    """The folder of a model: local, or downloaded from the hub (files that match `patterns` only).

    UserError in one sentence for a folder that isn't there, a wrong hub id, and no network.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source}: a file, where a model folder is needed")
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{source}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns) or [*SETTINGS, *WEIGHTS]))
    except GatedRepoError:
        raise UserError(
            f"{source}: the hub gives this model only to those it let in; log in with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{source}: neither a folder here nor a model on the hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"{source}: no such folder here, and the hub can't be reached ({first_line(error)})") from None
