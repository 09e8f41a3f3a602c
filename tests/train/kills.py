"""Runs that die in the middle of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

import train.loop


class KilledError(Exception):
    pass


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """What is inside must die in its optimizer step number `step`."""
    real, calls = train.loop.optimizer_step, 0

    def dying(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KilledError
        return real(*args, **kwargs)

    with patch.object(train.loop, "optimizer_step", dying), pytest.raises(KilledError):
        yield
