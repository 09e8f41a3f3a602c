"""Types of command-line arguments."""

import argparse

import pytest

from vlm.arguments import natural, positive, share


def test_shares_are_parts_or_percents() -> None:
    assert [share(text) for text in ("0", "0.005", "0.5%", "100%", "1")] == [0, 0.005, 0.005, 1, 1]
    for wrong in ("-0.1", "1.5", "101%", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="between 0 and 1"):
            share(wrong)


def test_numbers_have_a_least() -> None:
    assert (natural("0"), positive("1")) == (0, 1)
    for read, wrong in ((natural, "-1"), (positive, "0")):
        with pytest.raises(argparse.ArgumentTypeError, match="at least"):
            read(wrong)
