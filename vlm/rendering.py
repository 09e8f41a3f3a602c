"""Rendered chats with structure kept: what the template wrote, and what people did.

A chat is rendered twice: as it is, and with marks in place of people's texts. What lies between the marks is the
template's own, and the same for all chats with as many turns and images: it's remembered.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from vlm.errors import UserError
from vlm.templates import ends_in_newline, leaves_out_prompts

Message = dict[str, Any]
Kept = TypeVar("Kept")
THINK, THOUGHT = "<think>", "</think>"
KEPT = 1000  # frames that are remembered


class Segment(NamedTuple):
    """A stretch of the rendered chat: the template's own text, or (with `message` set) what that message says.

    frame: the template wrote it for that message, and it may hold control tokens: `<think>` around a thought, the space
    between ASSISTANT: and an answer. What stands behind the generation prompt is for the assistant to say.
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

    behind: the number of the text, that of its message, the template's text; leads: of the texts that begin an answer,
    by their place among those shown, how many characters before it stand behind the generation prompt.
    """

    head: str
    behind: list[tuple[int, int, str]]
    leads: dict[int, int]


class ChatRenderer:
    """Renders chats with one template. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._leaves_out_prompts, self._ends_in_newline = leaves_out_prompts(template), ends_in_newline(template)
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
                return self._give_away(found, [(owner, False) for _, owner, _ in known.behind], known.leads, messages)
        try:
            frame, segments, spans = self._cut(messages, rendered, add_generation_prompt, split=False)
        except UserError:
            # some templates (Qwen3's) take an answer apart, and write its thought in their own way
            if not any(THOUGHT in text for text in _answers(messages)):
                raise
            frame, segments, spans = self._cut(messages, rendered, add_generation_prompt, split=True)
            shape = None
        if shape is not None:
            keep(self._frames, shape, frame)
        owners = [(span.owner, span.thought) for span in spans]
        return self._give_away(segments, owners, frame.leads, messages)

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
        leads = self._leads(marked, [spans[number].owner for number in shown], shown, scaffolds)
        frame = _Frame(head, [(n, spans[n].owner, text) for n, text in zip(shown, behind_each, strict=True)], leads)
        segments = _fill(frame, [span.text for span in spans], rendered)
        if isinstance(segments, list):
            return frame, segments, [spans[number] for number in shown]
        if segments is None:
            raise UserError("the chat template's text depends on what the messages say; use another template")
        raise UserError(f"the chat template rewrites message {segments + 1} of {len(messages)}; use another template")

    def _leads(
        self, marked: Sequence[Message], owners: Sequence[int], shown: Sequence[int], scaffolds: Sequence[str]
    ) -> dict[int, int]:
        """Where an answer's first text follows what stands behind the generation prompt, how long that is."""
        leads: dict[int, int] = {}
        for place, owner in enumerate(owners):
            if marked[owner]["role"] != "assistant" or owner in owners[:place]:
                continue
            prompt = self._apply(marked[:owner], add_generation_prompt=True)
            # what a template writes before may depend on what comes later; what it writes behind the last text doesn't
            asked = prompt.rpartition(_mark(shown[place - 1]))[2] if place else prompt
            if scaffolds[place].startswith(asked):
                leads[place] = len(scaffolds[place]) - len(asked)
        return leads

    def _give_away(
        self,
        segments: Sequence[Segment],
        owners: Sequence[tuple[int, bool]],
        leads: Mapping[int, int],
        messages: Sequence[Message],
    ) -> list[Segment]:
        """The segments, with the template's text that is for an assistant to say given to its message: what stands
        behind the generation prompt, around a thought, and the newline that ends an answer.

        owners: of each text that is shown its message, and whether it is a thought.
        """
        framed = [segments[0]]
        for place, (owner, thought) in enumerate(owners):
            said, behind = segments[2 * place + 1], segments[2 * place + 2]
            before = framed.pop()
            if lead := leads.get(place):
                framed += [Segment(before.text[:-lead]), Segment(before.text[-lead:], owner, frame=True)]
            elif thought:
                head, opening, space = before.text.rpartition(THINK)
                opened = Segment(opening + space, owner, frame=True) if opening else Segment(space)
                framed += [Segment(head), opened]
            else:
                framed.append(before)
            last = place + 1 == len(owners) or owners[place + 1][0] != owner
            framed.append(said)
            if thought:
                behind = behind._replace(message=owner, frame=True)
            elif self._ends_in_newline and last and messages[owner]["role"] == "assistant":
                framed.append(Segment("\n", owner, frame=True))
                behind = Segment(behind.text.removeprefix("\n"))
            framed.append(behind)
        return framed

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
