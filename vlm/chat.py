"""From messages to token ids, with structure kept: every token knows which message it came from.

A chat template mixes control text with what people wrote. The template's own text may hold control tokens, what people
wrote may not: a literal `<image>` or `<|end|>` in a text stays text.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm.errors import UserError
from vlm.rendering import ChatRenderer, Message, Segment, keep

# what the Rust library takes for space beside a token that eats it (Python's isspace has four more)
_SPACE = r"[^\S\x1c-\x1f]*"
Read = tuple[Sequence[int], Sequence[int]]  # a piece's ids, and how far in it the characters of each go


@dataclass(frozen=True)
class ChatTokens:
    """input_ids [T]; supervised [T], True on what the assistant must say, end of turn included (not of a
    message with "weight": 0); messages [T], whose
    words a token is of, or the end of whose turn: the number of the message, None for the rest of the template."""

    input_ids: list[int]
    supervised: list[bool]
    messages: list[int | None]


class _Piece(NamedTuple):
    """A control token of the template, or (without `control`) ordinary text that must be tokenised as one."""

    segments: Sequence[Segment]
    control: int | None = None


class ChatEncoder:
    """Encodes chats with one tokenizer and template. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, image_token: str) -> None:
        self.tokenizer, self.renderer = tokenizer, ChatRenderer(tokenizer, template)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{type(tokenizer).__name__} has no fast tokenizer; use a model with a tokenizer.json")
        # private copies: the shared one switches per call
        described = json.loads(backend.to_str())
        self._whole, self._plain = _private(described, control=True), _private(described)
        # what follows a control token is no beginning: some tokenizers put a space before the first word of all alone
        inner = {**described, "pre_tokenizer": _never_first(described["pre_tokenizer"])}
        self._inner = self._plain if inner == described else _private(inner)
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._control, self._numbers = added, frozenset(added.values())
        longest_first = sorted(map(re.escape, filter(None, added)), key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        sides = {(True, False): "left", (False, True): "right", (True, True): "both"}
        self._eaters = {
            index: sides[token.lstrip, token.rstrip]
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.lstrip or token.rstrip
        }
        self._split: dict[str, list[tuple[str, int | None]]] = {}
        self.image_token, self.image_token_id = image_token, added.get(image_token)

    def encode(
        self, messages: Sequence[Message], placeholders: Sequence[int] = (), add_generation_prompt: bool = False
    ) -> ChatTokens:
        """Tokens of a chat. placeholders: how many image tokens take the place of each image's mark, in order.

        UserError when the template can't render it, or shows more or fewer images than these.
        """
        return self.tokenise(self.renderer.render(messages, add_generation_prompt), messages, placeholders)

    def tokenise(
        self, segments: Sequence[Segment], messages: Sequence[Message], placeholders: Sequence[int] = ()
    ) -> ChatTokens:
        pieces = self._pieces(segments)
        read = self._read_at_once(segments, pieces)
        if read is None:
            pieces = list(self._trimmed(pieces))
            read = [self._read(piece, inner=number > 0) for number, piece in enumerate(pieces)]
        ids: list[int] = []
        owners: list[int | None] = []
        num_images = 0
        speaking: int | None = None  # the message of which the text was said, and the end of its turn not yet
        said = 0  # tokens up to the last of its words: what a template writes between them and the end is said, too
        for (run, control), (tokens, stops) in zip(pieces, read, strict=True):
            if control is not None:
                if control == self.image_token_id:
                    count = placeholders[num_images] if num_images < len(placeholders) else 0
                    num_images += 1
                    ids += [control] * count
                    owners += [None] * count
                else:
                    ids.append(control)
                    owners.append(run[0].message if run[0].frame else speaking)
                    if speaking is not None and not run[0].frame:
                        owners[said:-1] = [speaking] * (len(owners) - 1 - said)
                speaking = None
                continue
            ids += tokens
            first = len(owners)
            if len(run) == 1:
                owners += [run[0].message] * len(tokens)
            else:
                ends = list(accumulate(len(segment.text) for segment in run))
                owners += [run[bisect_left(ends, stop)].message for stop in stops]
            for segment in run:
                speaking = speaking if segment.message is None else segment.message
            if speaking is not None:
                said = len(owners)
                while said > first and owners[said - 1] is None:
                    said -= 1
                said = said if said > first else len(owners)
        if num_images != len(placeholders):
            raise UserError(f"the chat template shows {num_images} images, and there are {len(placeholders)}")
        learned = {
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        }
        return ChatTokens(ids, [owner in learned for owner in owners], owners)

    def _read_at_once(self, segments: Sequence[Segment], pieces: Sequence[_Piece]) -> list[Read] | None:
        """All pieces by one call, which is fastest; None where the tokenizer sees other control tokens than the
        template's: people have written them, and each piece is to be read alone."""
        if self._eaters:
            return None
        encoding = _encode(self._whole, "".join(segment.text for segment in segments))
        ids, offsets = encoding.ids, encoding.offsets
        read: list[Read] = []
        place = start = 0
        for run, control in pieces:
            first = place
            if control is None:
                while place < len(ids) and ids[place] not in self._numbers:
                    place += 1
                stops = [stop - start for _, stop in offsets[first:place]] if len(run) > 1 else ()
                read.append((ids[first:place], stops))
            elif place < len(ids) and ids[place] == control and offsets[place][0] == start:
                place += 1
                read.append(((), ()))
            else:
                return None
            for segment in run:
                start += len(segment.text)
        return read if place == len(ids) else None

    def _read(self, piece: _Piece, inner: bool) -> Read:
        if piece.control is not None:
            return (), ()
        encoding = _encode(self._inner if inner else self._plain, "".join(segment.text for segment in piece.segments))
        return encoding.ids, [stop for _, stop in encoding.offsets]

    def encode_text(self, text: str, inner: bool = False) -> list[int]:
        """Ids of plain text; control tokens in it are text. inner: something stands before it."""
        ids: list[int] = _encode(self._inner if inner else self._plain, text).ids
        return ids

    def _pieces(self, segments: Sequence[Segment]) -> list[_Piece]:
        """Control tokens of the template, and between them runs of ordinary text."""
        pieces: list[_Piece] = []
        run: list[Segment] = []
        for segment in segments:
            text, message, frame = segment
            if message is not None and not frame:
                run.append(segment)
                continue
            for part, control in self._split.get(text) or self._find_control(text):
                if control is None:
                    run.append(Segment(part, message, frame))
                    continue
                if run:
                    pieces.append(_Piece(run))
                pieces.append(_Piece((Segment(part, message, frame),), control))
                run = []
        return [*pieces, _Piece(run)] if run else pieces

    def _find_control(self, text: str) -> list[tuple[str, int | None]]:
        """A template's text cut into control tokens, with their numbers, and what stands between them."""
        # what the pattern found stands between what it didn't
        parts = enumerate(self._tokens.split(text))
        found = [(part, self._control[part] if number % 2 else None) for number, part in parts if part]
        return keep(self._split, text, found)

    def _trimmed(self, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
        """The pieces without the spaces that a control token eats (Phi-3's do), whoever wrote them."""
        for number, (run, control) in enumerate(pieces):
            if control is None and self._eaters:
                before = pieces[number - 1].control if number else None
                after = pieces[number + 1].control if number + 1 < len(pieces) else None
                if before is not None and self._eaters.get(before, "") in ("right", "both"):
                    run = _strip(run, rf"\A{_SPACE}")
                if after is not None and self._eaters.get(after, "") in ("left", "both"):
                    run = _strip(run[::-1], rf"{_SPACE}\Z")[::-1]
                if not run:
                    continue
            yield _Piece(run, control)


def _private(described: dict[str, Any], control: bool = False) -> Tokenizer:
    """A tokenizer that reads control tokens in a text as text, or with `control` as control tokens."""
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.encode_special_tokens = not control
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _never_first(step: Any) -> Any:
    """A pre-tokenizer without the space that it puts before a text's first word, and no other."""
    if isinstance(step, dict) and step.get("prepend_scheme") == "first":
        return {**step, "prepend_scheme": "never"}
    if isinstance(step, dict) and "pretokenizers" in step:
        return {**step, "pretokenizers": [_never_first(part) for part in step["pretokenizers"]]}
    return step


def _encode(tokenizer: Tokenizer, text: str) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError:
        raise UserError("a text holds half of a surrogate pair, which is no character") from None


def _strip(run: Sequence[Segment], spaces: str) -> list[Segment]:
    """The run without these spaces of its first segments."""
    stripped = [*run]
    while stripped:
        stripped[0] = stripped[0]._replace(text=re.sub(spaces, "", stripped[0].text))
        if stripped[0].text:
            break
        del stripped[0]
    return stripped
