"""Which device and number format a command runs on."""

import ctypes
import sys

import torch

from vlm.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is: CUDA, then Apple's MPS, then the CPU."""
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} can't be used here: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA; fp32 on the CPU (faster below a width of about 192) and on MPS."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[name]


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step: training frees and asks for the same sizes again and again,
    and handing each back to the system costs up to a quarter of a small model's CPU time. Elsewhere it does nothing."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 25)  # the most that glibc takes
        mallopt(trim_threshold, (1 << 31) - 1)
