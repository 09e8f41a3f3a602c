"""Rendered chats with structure kept: what the template wrote, and what people did.

A chat is rendered twice: as it is, and with marks in place of people's texts. What lies between the marks is the
template's own, and the same for all chats with as many turns and images: it's remembered.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from vlm.errors import UserError
from vlm.templates import leaves_out_prompts

Message = dict[str, Any]
Kept = TypeVar("Kept")
THINK, THOUGHT = "<think>", "</think>"
KEPT = 1000  # frames that are remembered


class Segment(NamedTuple):
    """A stretch of the rendered chat: the template's own text, or (with `message` set) what that message says.

    frame: the template wrote it for that message, and it may hold control tokens: `<think>` around a thought.
    """

    text: str
    message: int | None = None
    frame: bool = False


class _Span(NamedTuple):
    """A text of a message for which a mark stands. optional: the template may leave it out; thought: it is what an
    assistant thought, and the next one is its answer."""

    text: str
    owner: int
    optional: bool = False
    thought: bool = False


class _Frame(NamedTuple):
    """What a template writes around people's texts: before all of them, and behind each that it shows.

    behind: the number of the text, that of its message, the template's text.
    """

    head: str
    behind: list[tuple[int, int, str]]


class ChatRenderer:
    """Renders chats with one template. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._leaves_out_prompts = leaves_out_prompts(template)
        self._frames: dict[Any, _Frame] = {}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        """The chat as the template writes it, cut into the template's text and the people's."""
        rendered = self._apply(messages, add_generation_prompt)
        shape = _shape(messages, add_generation_prompt)
        known = self._frames.get(shape)
        if known is not None:
            texts = [text for message in messages for text in _texts(message)]
            found = _fill(known, texts, rendered)
            if isinstance(found, list):  # else it may hold yesterday's date
                return found
        try:
            frame, segments, _ = self._cut(messages, rendered, add_generation_prompt, split=False)
        except UserError:
            # some templates (Qwen3's) take an answer apart, and write its thought in their own way
            if not any(THOUGHT in text for text in _answers(messages)):
                raise
            _, segments, spans = self._cut(messages, rendered, add_generation_prompt, split=True)
            return _frame_thoughts(segments, spans)
        if shape is not None:
            keep(self._frames, shape, frame)
        return segments

    def _cut(
        self, messages: Sequence[Message], rendered: str, add_generation_prompt: bool, split: bool
    ) -> tuple[_Frame, list[Segment], list[_Span]]:
        """What stands around the texts, all of it in order, and those of the texts that are there."""
        # the texts may hold marks, too: they are not there when the marks are looked for
        spans: list[_Span] = []
        marked = [self._mark(number, message, spans, split) for number, message in enumerate(messages)]
        rest = self._apply(marked, add_generation_prompt)
        shown: list[int] = []
        scaffolds: list[str] = []
        for number, span in enumerate(spans):
            scaffold, here, behind = rest.partition(_mark(number))
            if here:
                shown.append(number)
                scaffolds.append(scaffold)
                rest = behind
            elif not span.optional:
                raise UserError(
                    f"the chat template drops message {span.owner + 1} of {len(messages)}; use another template"
                )
        head, *behind_each = [*scaffolds, rest]
        frame = _Frame(head, [(n, spans[n].owner, text) for n, text in zip(shown, behind_each, strict=True)])
        segments = _fill(frame, [span.text for span in spans], rendered)
        if isinstance(segments, list):
            return frame, segments, [spans[number] for number in shown]
        if segments is None:
            raise UserError("the chat template's text depends on what the messages say; use another template")
        raise UserError(f"the chat template rewrites message {segments + 1} of {len(messages)}; use another template")

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


def keep(known: dict[Any, Kept], key: Any, value: Kept) -> Kept:
    """Remembers a value among few."""
    if len(known) >= KEPT:
        known.clear()
    known[key] = value
    return value


def _shape(messages: Sequence[Message], add_generation_prompt: bool) -> tuple[Any, ...] | None:
    """All that a template is told beside the texts; None where messages hold more than texts and images."""
    shape: list[Any] = [add_generation_prompt]
    for message in messages:
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            shape.append(role)
        else:
            shape.append((role, *[part["type"] for part in content]))
            if any(len(part) != (2 if part["type"] == "text" else 1) for part in content):
                return None
        if len(message) != 2:
            return None
    return tuple(shape)


def _fill(frame: _Frame, texts: Sequence[str], rendered: str) -> list[Segment] | int | None:
    """The rendered chat in segments. Else the number of a message that isn't in it where it should be, or None: all
    are, and the frame is another."""
    segments = [Segment(frame.head)]
    position = len(frame.head)
    for number, owner, behind in frame.behind:
        for said in _forms(texts[number]):
            if rendered.startswith(said, position) and rendered.startswith(behind, position + len(said)):
                break
        else:
            return owner
        segments += [Segment(said, owner), Segment(behind)]
        position += len(said) + len(behind)
    return segments if rendered.startswith(frame.head) and position == len(rendered) else None


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
    yield text
    for characters in (None, "\n"):
        yield from (text.strip(characters), text.lstrip(characters), text.rstrip(characters))


def _frame_thoughts(segments: Sequence[Segment], spans: Sequence[_Span]) -> list[Segment]:
    """The segments, with the template's text around a thought given to the answer: it is for the assistant to say."""
    framed = [segments[0]]
    for number, span in enumerate(spans):
        said, behind = segments[2 * number + 1], segments[2 * number + 2]
        if span.thought:
            before, opening, space = framed.pop().text.rpartition(THINK)
            opened = Segment(opening + space, span.owner, frame=True) if opening else Segment(space)
            framed += [Segment(before), opened]
            behind = behind._replace(message=span.owner, frame=True)
        framed += [said, behind]
    return framed
