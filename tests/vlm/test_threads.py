"""Threads by what a process may use, and how they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.threads import SPIN_COUNT, describe_threads, settle_threads, usable_cores


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        # the quota of a group above, and a container that sees its own tree under the host's path
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/docker/0123\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            "4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ("3:cpuset:/x\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        ("\nodd\n0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_quotas_of_control_groups_bound_the_cores(
    tmp_path: Path, cgroup: str, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(machine(tmp_path, cgroup, files)) == cores


def test_affinity_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3}, raising=False)
    assert usable_cores(machine(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"})) == 1


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": None}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_what_the_environment_names_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], settled: dict[str, str | None]
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back, also where it wasn't set
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settle_threads()
    assert {name: os.environ.get(name) for name in settled} == settled
    assert "OMP_NUM_THREADS" in os.environ


def test_every_command_settles_its_threads_before_torch_is_loaded(tmp_path: Path) -> None:
    """libgomp reads its environment once, when torch loads it."""
    script = (
        "import sys, os, vlm.cli\n"
        "vlm.cli.COMMANDS['demo'] = ('probe:demo', '')\n"
        "raise SystemExit(vlm.cli.main(['demo']))\n"
    )
    (tmp_path / "probe.py").write_text(
        "import sys\n"
        "def demo(parser): parser.set_defaults(run=run)\n"
        "def run(options):\n"
        "    import os\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(os.environ['GOMP_SPINCOUNT'], os.environ['OMP_NUM_THREADS'])\n"
        "    import torch\n"
        "    print(torch.get_num_threads())\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", script]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.split() == [SPIN_COUNT, "1", "1"], done.stderr


def test_the_log_line_says_what_was_chosen() -> None:
    line = describe_threads()
    assert "threads: " in line
    assert f"GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}" in line
