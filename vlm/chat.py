"""From messages to token ids, with structure kept: every token knows which message it came from.

A chat template mixes control text with what people wrote. It is rendered once with marks in place of the people's
texts; what lies between the marks is the template's own and may hold control tokens, what people wrote may not: a
literal `<image>` or `<|end|>` in a text stays text. The result is checked against the template's real rendering.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm.errors import UserError
from vlm.templates import leaves_out_prompts

Message = dict[str, Any]
THINK, THOUGHT = "<think>", "</think>"
# what the Rust library takes for space beside a token that eats it (Python's isspace has four more)
_SPACE = r"[^\S\x1c-\x1f]*"


@dataclass(frozen=True)
class ChatTokens:
    """input_ids [T]; supervised [T], True on what the assistant must say, end of turn included; messages [T], whose
    words a token is of, or the end of whose turn: the number of the message, None for the rest of the template."""

    input_ids: list[int]
    supervised: list[bool]
    messages: list[int | None]


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered chat: the template's own text, or (with `message` set) what that message says.

    frame: the template wrote it for that message, and it may hold control tokens: `<think>` around a thought.
    """

    text: str
    message: int | None = None
    frame: bool = False


@dataclass(frozen=True)
class _Span:
    """A text of a message for which a mark stands. optional: the template may leave it out; thought: it is what an
    assistant thought, and the next one is its answer."""

    text: str
    owner: int
    optional: bool = False
    thought: bool = False


class ChatEncoder:
    """Encodes chats with one tokenizer and template. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, image_token: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{type(tokenizer).__name__} has no fast tokenizer; use a model with a tokenizer.json")
        # private copies: the shared one switches per call
        described = json.loads(backend.to_str())
        self._plain = _private(described)
        # what follows a control token is no beginning: some tokenizers put a space before the first word of all alone
        self._inner = _private({**described, "pre_tokenizer": _never_first(described["pre_tokenizer"])})
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._control = added
        longest_first = sorted(map(re.escape, filter(None, added)), key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        sides = {(True, False): "left", (False, True): "right", (True, True): "both"}
        self._eaters = {
            index: sides[token.lstrip, token.rstrip]
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.lstrip or token.rstrip
        }
        self._leaves_out_prompts = leaves_out_prompts(template)
        self.image_token, self.image_token_id = image_token, added.get(image_token)

    def encode(
        self, messages: Sequence[Message], placeholders: Sequence[int] = (), add_generation_prompt: bool = False
    ) -> ChatTokens:
        """Tokens of a chat. placeholders: how many image tokens take the place of each image's mark, in order.

        UserError when the template can't render it, or shows more or fewer images than these.
        """
        return self.tokenise(self.render(messages, add_generation_prompt), messages, placeholders)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        """The chat as the template writes it, cut into the template's text and the people's."""
        rendered = self._apply(messages, add_generation_prompt)
        try:
            return self._cut(messages, rendered, add_generation_prompt, split=False)
        except UserError:
            # some templates (Qwen3's) take an answer apart, and write its thought in their own way
            if not any(THOUGHT in text for text in _answers(messages)):
                raise
            return self._cut(messages, rendered, add_generation_prompt, split=True)

    def _cut(
        self, messages: Sequence[Message], rendered: str, add_generation_prompt: bool, split: bool
    ) -> list[Segment]:
        # the texts may hold marks, too: they are not there when the marks are looked for
        spans: list[_Span] = []
        marked = [self._mark(number, message, spans, split) for number, message in enumerate(messages)]
        rest = self._apply(marked, add_generation_prompt)
        found: list[tuple[_Span, str]] = []
        for number, span in enumerate(spans):
            scaffold, here, behind = rest.partition(_mark(number))
            if here:
                found.append((span, scaffold))
                rest = behind
            elif not span.optional:
                raise UserError(
                    f"the chat template drops message {span.owner + 1} of {len(messages)}; use another template"
                )
        scaffolds = [*(scaffold for _, scaffold in found[1:]), rest] if found else []
        segments = [Segment(found[0][1] if found else rest)]
        position = len(segments[0].text)
        for (span, _), scaffold in zip(found, scaffolds, strict=True):
            said = next((form for form in _forms(span.text) if rendered.startswith(form + scaffold, position)), None)
            if said is None:
                raise UserError(
                    f"the chat template rewrites message {span.owner + 1} of {len(messages)}; use another template"
                )
            segments += [Segment(said, span.owner), Segment(scaffold)]
            position += len(said) + len(scaffold)
        if "".join(segment.text for segment in segments) != rendered:
            raise UserError("the chat template's text depends on what the messages say; use another template")
        return _frame_thoughts(segments, [span for span, _ in found]) if split else segments

    def _mark(self, number: int, message: Message, spans: list[_Span], split: bool) -> Message:
        """The message with marks for its texts, which are added to `spans`."""
        answers = message["role"] == "assistant"
        optional = not answers and self._leaves_out_prompts
        marked = []
        for text in _texts(message):
            if split and answers and THOUGHT in text:
                thought = text.partition(THOUGHT)[0].rpartition(THINK)[2]
                answer = text.rpartition(THOUGHT)[2]
                marked.append(f"{THINK}\n{_mark(len(spans))}\n{THOUGHT}\n\n{_mark(len(spans) + 1)}")
                spans += [_Span(thought, number, optional=True, thought=True), _Span(answer, number)]
            else:
                marked.append(_mark(len(spans)))
                spans.append(_Span(text, number, optional))
        return _with_texts(message, marked)

    def tokenise(
        self, segments: Sequence[Segment], messages: Sequence[Message], placeholders: Sequence[int] = ()
    ) -> ChatTokens:
        ids: list[int] = []
        owners: list[int | None] = []
        num_images = 0
        speaking: int | None = None  # the message of which the text was said, and the end of its turn not yet
        for piece, control in self._trimmed(self._pieces(segments)):
            if control is not None:
                if control == self.image_token_id:
                    count = placeholders[num_images] if num_images < len(placeholders) else 0
                    num_images += 1
                    ids += [control] * count
                    owners += [None] * count
                else:
                    ids.append(control)
                    owners.append(piece[0].message if piece[0].frame else speaking)
                speaking = None
                continue
            encoding = self._encode("".join(segment.text for segment in piece), inner=bool(ids))
            for segment in piece:
                speaking = speaking if segment.message is None else segment.message
            ends = list(accumulate(len(segment.text) for segment in piece))
            ids += encoding.ids
            owners += [piece[bisect_left(ends, stop)].message for _, stop in encoding.offsets]
        if num_images != len(placeholders):
            raise UserError(f"the chat template shows {num_images} images, and there are {len(placeholders)}")
        supervised = [owner is not None and messages[owner]["role"] == "assistant" for owner in owners]
        return ChatTokens(ids, supervised, owners)

    def encode_text(self, text: str, inner: bool = False) -> list[int]:
        """Ids of plain text; control tokens in it are text. inner: something stands before it."""
        ids: list[int] = self._encode(text, inner).ids
        return ids

    def _encode(self, text: str, inner: bool = False) -> Any:
        try:
            return (self._inner if inner else self._plain).encode(text, add_special_tokens=False)
        except TypeError:
            raise UserError("a text holds half of a surrogate pair, which is no character") from None

    def _pieces(self, segments: Sequence[Segment]) -> list[tuple[list[Segment], int | None]]:
        """Control tokens of the template (with their segment), and between them runs of ordinary text that must be
        tokenised as one."""
        pieces: list[tuple[list[Segment], int | None]] = []
        run: list[Segment] = []
        for segment in segments:
            if segment.message is not None and not segment.frame:
                run.append(segment)
                continue
            for number, text in enumerate(self._tokens.split(segment.text)):
                if number % 2:  # what the pattern found stands between what it didn't
                    if run:
                        pieces.append((run, None))
                    pieces.append(([segment], self._control[text]))
                    run = []
                elif text:
                    run.append(replace(segment, text=text))
        return [*pieces, (run, None)] if run else pieces

    def _trimmed(self, pieces: list[tuple[list[Segment], int | None]]) -> Iterator[tuple[list[Segment], int | None]]:
        """The pieces without the spaces that a control token eats (Phi-3's do), whoever wrote them."""
        for number, (run, control) in enumerate(pieces):
            if control is None and self._eaters:
                before = pieces[number - 1][1] if number else None
                after = pieces[number + 1][1] if number + 1 < len(pieces) else None
                if before is not None and self._eaters.get(before, "") in ("right", "both"):
                    run = _strip(run, rf"\A{_SPACE}")
                if after is not None and self._eaters.get(after, "") in ("left", "both"):
                    run = _strip(run[::-1], rf"{_SPACE}\Z")[::-1]
                if not run:
                    continue
            yield run, control

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # templates raise whatever they like; all of it is about the messages
            raise UserError(f"the chat template refuses these messages: {error}") from error
        assert isinstance(rendered, str)
        return rendered


def _private(described: dict[str, Any]) -> Tokenizer:
    """A tokenizer that reads control tokens in ordinary text as text."""
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.encode_special_tokens = True
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


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _with_texts(message: Message, texts: list[str]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": texts[0]}
    rest = iter(texts)
    parts = [{**part, "text": next(rest)} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


def _answers(messages: Sequence[Message]) -> list[str]:
    return [text for message in messages if message["role"] == "assistant" for text in _texts(message)]


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _forms(text: str) -> Iterator[str]:
    """What templates make of a text: many strip it, or an end of it, of all space or of line ends."""
    for characters in (None, "\n"):
        yield from (text, text.strip(characters), text.lstrip(characters), text.rstrip(characters))


def _frame_thoughts(segments: Sequence[Segment], spans: Sequence[_Span]) -> list[Segment]:
    """The segments, with the template's text around a thought given to the answer: it is for the assistant to say."""
    framed = [segments[0]]
    for number, span in enumerate(spans):
        said, behind = segments[2 * number + 1], segments[2 * number + 2]
        if span.thought:
            before, opening, space = framed.pop().text.rpartition(THINK)
            opened = Segment(opening + space, span.owner, frame=True) if opening else Segment(space)
            framed += [Segment(before), opened]
            behind = replace(behind, message=span.owner, frame=True)
        framed += [said, behind]
    return framed


def _strip(run: Sequence[Segment], spaces: str) -> list[Segment]:
    """The run without these spaces of its first segments."""
    stripped = [*run]
    while stripped:
        stripped[0] = replace(stripped[0], text=re.sub(spaces, "", stripped[0].text))
        if stripped[0].text:
            break
        del stripped[0]
    return stripped
