"""How many threads a process computes with, and how they wait: settled before torch is loaded, which reads it once."""

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

# How often a waiting thread of libgomp looks again before it sleeps. By default it spins for milliseconds: beside one
# busy process a core, two threads then train fifty times slower. At 1000 they lose little there, and nothing on idle
# cores.
SPIN_COUNT = "1000"
_OWN_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def settle_threads() -> None:
    """As many threads as cores may be used, which give way while they wait; what the environment names already stays.

    Child processes inherit both.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if not any(name in os.environ for name in _OWN_CHOICE):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, and by the CPU quotas of its control groups, rounded up.

    root: where /proc and /sys are found.
    """
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affine, *map(math.ceil, _quotas(root))]))


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def describe_threads() -> str:
    """What this process computes with, on one line, for logs. Loads torch."""
    import torch

    waiting = ", ".join(f"{name}={os.environ[name]}" for name in _OWN_CHOICE if name in os.environ)
    return (
        f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}, "
        f"usable cores: {usable_cores()}{f' ({waiting})' if waiting else ''}"
    )


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that a control group or one above it may take; both versions of them."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    mounts = root / "sys/fs/cgroup"
    for group in groups:
        if group.count(":") < 2:
            continue
        _, controllers, path = group.split(":", 2)
        if not controllers:
            trees = (mounts, mounts / "unified")
        elif "cpu" in controllers.split(","):
            trees = (mounts / controllers, mounts / "cpu")
        else:
            continue
        for tree in trees:
            folder = tree / path.lstrip("/")
            # of a container the path may be the host's: then only the tree's own root is there, and is the container's
            for place in (folder, *(above for above in folder.parents if above.is_relative_to(tree))):
                yield from _quota(place)


def _quota(group: Path) -> Iterator[float]:
    """cpu.max of version 2 is "QUOTA PERIOD" or "max PERIOD", cpu.cfs_quota_us of version 1 a number or -1."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
    except (OSError, ValueError):  # no group, or none that bounds time
        return
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)
