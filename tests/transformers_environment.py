"""Environments with other versions of transformers: python tests/transformers_environment.py "transformers<5".

Each holds one transformers and what it needs but torch, which is linked from the environment that runs this. Built
aside and renamed when whole, and kept in the user's cache.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

REVISION = 1  # of the steps below
# what transformers wants at run time here beside its own requirements, and torch needs
BESIDE = ["pillow", "jinja2", "sympy", "networkx", "filelock", "fsspec", "typing_extensions"]


class UnavailableError(Exception):
    """This machine can't have the environment; the text says why."""


def environment(requirement: str, root: Path | None = None) -> Path:
    """The interpreter of an environment with e.g. "transformers<5", built where it is missing."""
    root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"
    torch = distribution("torch").version
    recipe = json.dumps([requirement, torch, BESIDE, REVISION, sys.version_info[:2]])
    folder = root / f"transformers-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            _build(partial, requirement)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / "bin" / "python"


def _build(folder: Path, requirement: str) -> None:
    _run(sys.executable, "-m", "venv", str(folder))
    _run(str(folder / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir", requirement, *BESIDE)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    site = Path(found.origin).parents[1]
    # CUDA builds of torch keep libraries in neighbours of theirs
    for path in [*site.glob("torch*"), *site.glob("functorch*"), *site.glob("nvidia*"), *site.glob("triton*")]:
        if not path.name.startswith(("torchvision", "torchaudio")):
            (packages / path.name).symlink_to(path)


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        raise UnavailableError(f"{' '.join(command[1:5])} ... failed: {said[-1]}")


if __name__ == "__main__":
    try:
        print(environment(sys.argv[1]))
    except UnavailableError as error:
        sys.exit(f"no such environment: {error}")
