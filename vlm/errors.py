"""The one error that is meant for people: its text says what is wrong, where, and what to do about it."""


class UserError(ValueError):
    """Bad input. The command line prints the text alone and exits 1; the server answers 400 with it."""
