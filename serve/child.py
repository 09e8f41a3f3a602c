"""Another program as a child that gets this process's signals, and whose exit code becomes this one's."""

import ctypes
import signal
import subprocess
import sys
from types import FrameType


def run(command: list[str], environment: dict[str, str]) -> int:
    """Runs the server as a child in a session of its own; passes signals on to it, and its exit code back."""
    child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    earlier = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        code = child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
            child.wait()
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Asks Linux to end the child when this process is killed and can't pass the signal on."""
    if sys.platform == "linux":
        set_death_signal = 1  # sys/prctl.h
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
