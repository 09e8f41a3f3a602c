"""Walks over a JSON file of any size through a window of a few MB, and says where its values begin and end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from data.progress import Tell
from vlm.errors import UserError

MOST_BYTES = 64 << 20  # of one row
_WINDOW = 4 << 20
_SPACE = " \t\r\n"
_TAIL = 16  # the longest token that a window's end may cut without an error of its own: -Infinity, \ud83d\ude00, 1.5e+


class Scanner:
    """A place in a JSON file. `value` decodes what stands there, `members` goes into an array or object.

    The window is decoded as Latin-1, where characters are bytes, so places in it are places in the file; texts of
    decoded values are therefore right only where they're ASCII, and numbers come as they're written. `place`: the
    index or key of the member that is being read, for errors.
    """

    def __init__(self, file: BinaryIO, path: Path, tell: Tell | None = None) -> None:
        self.file, self.path, self.tell = file, path, tell
        self.place: int | str | None = None
        self.key_offset = 0  # where the key of an object's member begins
        self._text, self._at = "", 0
        self._base = 0  # the window's place in the file
        self._ended = False
        self._decoder = json.JSONDecoder(parse_int=str, parse_float=str)
        self._more()
        if self._text.startswith("\xef\xbb\xbf"):
            self._at = 3
        elif self._text.startswith(("\xff\xfe", "\xfe\xff")):
            raise UserError(f"{path}: UTF-16, where UTF-8 is needed; save it as UTF-8")

    @property
    def offset(self) -> int:
        """The place in the file, in bytes."""
        return self._base + self._at

    def peek(self) -> str:
        """The next character that isn't white space, "" at the file's end. The scanner then stands before it."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def value(self) -> tuple[int, int, Any]:
        """The value that stands here: where it begins, where it ends, what it is. The scanner then stands behind."""
        if not self.peek():
            self._cut_off()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _TAIL
                if cut and self._more():
                    continue
                if error.msg.startswith("Unterminated") or error.pos >= len(self._text.rstrip(_SPACE)):
                    self._cut_off()
                self._refuse(error.msg, error.pos)
            except RecursionError:
                self._refuse("nested too deeply", self._at)
            if end > len(self._text) - _TAIL and self._more():  # a number might go on
                continue
            start, self._at = self._base + self._at, end
            return start, self._base + end, found

    def skip(self) -> None:
        """Goes behind the value that stands here; an array or object may be larger than what `value` decodes."""
        if self.peek() and self.peek() in "[{":
            for _ in self.members():
                self.value()
        else:
            self.value()

    def members(self) -> Iterator[int | str]:
        """Indices of an array or keys of an object; at each, the caller takes the value before it asks for the next."""
        opening = self.peek()
        if opening not in ("[", "{"):
            self._due("an array or object")
        closing = "]" if opening == "[" else "}"
        self._at += 1
        number = 0
        while True:
            mark = self.peek()
            if mark == closing and number == 0:
                break
            if opening == "{":
                if mark != '"':
                    self._due("a key")
                self.key_offset, _, self.place = self.value()
                if self.peek() != ":":
                    self._due("':'")
                self._at += 1
            else:
                self.place = number
            yield self.place
            number += 1
            mark = self.peek()
            if mark == closing:
                break
            if mark != ",":
                self._due(f"',' or '{closing}'")
            self._at += 1
        self._at += 1
        self.place = None

    def end(self) -> None:
        """Refuses a file that goes on."""
        if self.peek():
            self._refuse("more behind its end", self._at)

    def _more(self) -> bool:
        """Moves the window on: what is behind is let go, what stands ahead grows. False at the file's end."""
        if self._ended:
            return False
        ahead = len(self._text) - self._at
        if ahead > MOST_BYTES:
            raise UserError(f"{self._where()}: a value of more than {MOST_BYTES >> 20} MB, line {self._line(self._at)}")
        read = self.file.read(max(_WINDOW, ahead))
        if not read:
            self._ended = True
            return False
        self._base += self._at
        self._text, self._at = self._text[self._at :] + read.decode("latin-1"), 0
        if self.tell is not None:
            self.tell(self._base)
        return True

    def _due(self, what: str) -> NoReturn:
        if not self.peek():
            self._cut_off()
        self._refuse(f"{what} is due", self._at)

    def _cut_off(self) -> NoReturn:
        raise UserError(f"{self._where()}: not valid JSON (the file ends in the middle; was it cut off?)")

    def _refuse(self, why: str, position: int) -> NoReturn:
        raise UserError(f"{self._where()}: not valid JSON ({why}, line {self._line(position)})")

    def _where(self) -> str:
        return f"{self.path}" if self.place is None else f"{self.path}[{self.place}]"

    def _line(self, position: int) -> int:
        """The number of the line, counted only for errors."""
        left, line = self._base + position, 1
        self.file.seek(0)
        while left > 0 and (read := self.file.read(min(left, _WINDOW))):
            line += read.count(b"\n")
            left -= len(read)
        return line
