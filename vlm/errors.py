"""The one error that is meant for people, and how others are told in it."""


class UserError(ValueError):
    """Bad input: its text says what is wrong, where, and what to do about it.

    The command line prints the text alone and exits 1; the server answers 400 with it.
    """


def first_line(error: BaseException) -> str:
    """What an error says, as the end of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].rstrip().endswith(":")])
