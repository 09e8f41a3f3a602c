"""The one error that is meant for people, and how others are told in it."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Bad input: its text says what is wrong, where, and what to do about it.

    The command line prints the text alone and exits 1; the server answers 400 with it.
    """


class DiskFullError(UserError):
    """There is no room for what was to be written."""


def disk_full(error: BaseException) -> str | None:
    """What the system said, where an error comes of a full disk, a quota or a limit of sizes; else None.

    Libraries in Rust give the system's number as text alone, and those in C++ raise an error of their own over it.
    """
    found: BaseException | None = error
    while found is not None:
        number = found.errno if isinstance(found, OSError) else None
        if told := re.search(r"\(os error (\d+)\)", str(found)):
            number = int(told[1])
        if number in FULL:
            return os.strerror(number)
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def room_for(path: object) -> Iterator[None]:
    """What is inside writes `path`: DiskFullError, which names it, where there is no room."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (said := disk_full(error)) is None:
            raise
        raise DiskFullError(f"{path}: can't be written ({said})") from error


def first_line(error: BaseException) -> str:
    """What an error says, as the end of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].rstrip().endswith(":")])
