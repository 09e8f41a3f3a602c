"""The numeric tests under another set of vector instructions, as other processors have: their roundings differ.

Tolerances are ten times what was seen under ATEN_CPU_CAPABILITY=default, avx2 and avx512 with one and two threads.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NUMERIC = (
    "tests/train/test_packing.py",
    "tests/train/test_loop.py",
    "tests/vlm/test_llava_parity.py",
    "tests/vlm/test_flamingo_equations.py",
    "tests/vlm/test_convert_parity.py",
    "tests/vlm/test_convert_merge.py",
    "tests/vlm/test_convert_flamingo.py",
    "tests/vlm/test_convert_llava.py",
    "tests/vlm/test_compositions.py",
    "tests/vlm/test_tiling.py",
    "tests/vlm/test_generation.py",
)


def another_capability() -> str:
    """The next lower one that this torch has; where it has only one, that one."""
    here = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx2", "AVX2": "default"}.get(here, here.lower())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_packing_parity_and_resume_hold_under_another_capability() -> None:
    capability = another_capability()
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    told = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip().lower() == capability
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NUMERIC]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{capability}:\n{done.stdout[-4000:]}"
