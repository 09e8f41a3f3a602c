"""Text from tokens as they come: never half a character, never a stop string."""

from collections.abc import Callable, Sequence

from vlm.errors import UserError

REPLACEMENT = "\ufffd"
# a character of UTF-8 has up to 4 bytes, so up to 3 of them may stand for one that is still being spelled
MAX_INCOMPLETE = 3
# only broken text stays incomplete this long
MAX_WINDOW = 64

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """The text of one choice. `decode` turns ids into text, leaving special tokens out.

    Tokenizers decode in context (a leading space, a character spread over tokens), so the latest tokens are decoded
    together with the ones before them, back to the last place where the text was whole.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._sent = 0  # characters of the window's text that are in self._text
        self._whole = 0  # tokens of the window up to the last place where its text was whole
        self._text = ""  # everything decoded so far
        self._released = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is certain now. `stopped` says that a stop string was met."""
        self._ids.append(token_id)
        window = self._decode(self._ids)
        incomplete = min(MAX_INCOMPLETE, len(window) - len(window.rstrip(REPLACEMENT)))
        if incomplete and len(self._ids) < MAX_WINDOW:
            self._append(window[self._sent : len(window) - incomplete])
        else:
            self._append(window[self._sent :])
            self._ids = self._ids[self._whole :]
            self._whole = len(self._ids)
            self._sent = len(self._decode(self._ids))
        return self._release(self._held())

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        if not self.stopped:
            self._append(self._decode(self._ids)[self._sent :])
        return self._release(0)

    def _append(self, text: str) -> None:
        if not text:
            return
        begin = max(0, len(self._text) - self._longest + 1)
        self._text += text
        self._sent += len(text)
        hits = [hit for hit in (self._text.find(stop, begin) for stop in self._stop) if hit >= 0]
        if hits:
            self._text = self._text[: min(hits)]
            self.stopped = True

    def _held(self) -> int:
        """Length of the end of the text that may become a stop string."""
        if self.stopped or not self._stop:
            return 0
        tail = self._text[-(self._longest - 1) :] if self._longest > 1 else ""
        beginnings = (i for i in range(len(tail)) if any(stop.startswith(tail[i:]) for stop in self._stop))
        first = next(beginnings, None)
        return 0 if first is None else len(tail) - first

    def _release(self, held: int) -> str:
        end = max(self._released, len(self._text) - held)
        text, self._released = self._text[self._released : end], end
        return text


def make_decode(tokenizer: object) -> Decode:
    """The decoding function of a fast tokenizer; UserError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} has no fast tokenizer; use a model with a tokenizer.json")

    def decode(ids: Sequence[int]) -> str:
        text: str = backend.decode(list(ids), skip_special_tokens=True)
        return text

    return decode
