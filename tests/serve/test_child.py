import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from serve.child import run

ROOT = Path(__file__).resolve().parents[2]


def test_signals_reach_the_server_and_its_code_comes_back() -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(5))\n"
        "print('ready', flush=True)\ntime.sleep(30)\n"
    )
    assert run([sys.executable, "-c", "import sys; sys.exit(3)"], dict(os.environ)) == 3
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run([sys.executable, "-c", kill], dict(os.environ)) == 128 + signal.SIGKILL
    outer = f"import sys; from serve.child import run; sys.exit(run([sys.executable, '-c', {code!r}], {{}}))"
    for number in (signal.SIGTERM, signal.SIGKILL):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        running = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True, env=environment)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        watchdog = threading.Timer(10, running.kill)
        watchdog.start()
        assert running.stdout.read() == "", "the server lives on, and holds the pipe"
        assert running.wait() == (5 if number == signal.SIGTERM else -signal.SIGKILL)
        watchdog.cancel()
