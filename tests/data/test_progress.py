"""How far long work has come: nothing for a moment, lines where nobody looks, a bar on a terminal."""

import io
import sys

import pytest

from data import progress as module
from data.progress import progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_lines_come_now_and_then_with_the_time_that_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("indexing rows.json", 200) as tell:
        for done in range(200):
            clock.now += 0.125
            tell(done)
    told = capsys.readouterr()
    assert told.err.splitlines() == ["indexing rows.json: 40 %, 15 s left", "indexing rows.json: 80 %, 5 s left"]
    assert not told.out


def test_what_is_done_in_a_moment_needs_no_word(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress("rows", 3) as tell:
        tell(1)
    assert not screen.getvalue()
    with progress("rows", 3, bytes=True) as tell:
        clock.now += 2
        for done in range(4):
            tell(done)
    assert "rows" in screen.getvalue()
    assert "3/3 bytes" in screen.getvalue()
