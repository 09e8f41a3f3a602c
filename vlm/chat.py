"""From messages to token ids, with structure kept: every token knows which message it came from.

A chat template mixes control text with what people wrote. It is rendered once with marks in place of the people's
texts; what lies between the marks is the template's own and may hold control tokens, what people wrote may not: a
literal `<image>` or `<|end|>` in a text stays text. The result is checked against the template's real rendering.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm.errors import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTokens:
    """input_ids [T]; supervised [T], True on what the assistant must say, end of turn included."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered chat: the template's own text, or (with `message` set) what that message says."""

    text: str
    message: int | None = None


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
        self._control = dict(sorted(added.items(), key=lambda item: -len(item[0])))
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
        texts = [text for message in messages for text in _texts(message)]
        # the texts may hold marks, too: they are not there when the marks are looked for
        marks = [f"\ue000{index}\ue001" for index in range(len(texts))]
        numbers = iter(range(len(texts)))
        marked = [_with_texts(message, [marks[next(numbers)] for _ in _texts(message)]) for message in messages]
        rest = self._apply(marked, add_generation_prompt)
        rendered = self._apply(messages, add_generation_prompt)
        owners = [index for index, message in enumerate(messages) for _ in _texts(message)]
        scaffolds: list[str] = []
        for here, owner in zip(marks, owners, strict=True):
            scaffold, found, rest = rest.partition(here)
            if not found:
                raise UserError(f"the chat template drops message {owner + 1} of {len(messages)}; use another template")
            scaffolds.append(scaffold)
        scaffolds.append(rest)
        segments = [Segment(scaffolds[0])]
        position = len(scaffolds[0])
        for text, owner, scaffold in zip(texts, owners, scaffolds[1:], strict=True):
            # many templates strip what people wrote, or an end of it
            stripped = (text, text.strip(), text.lstrip(), text.rstrip())
            forms = (form for form in stripped if rendered.startswith(form + scaffold, position))
            said = next(forms, None)
            if said is None:
                raise UserError(
                    f"the chat template rewrites message {owner + 1} of {len(messages)}; use another template"
                )
            segments += [Segment(said, owner), Segment(scaffold)]
            position += len(said) + len(scaffold)
        if "".join(segment.text for segment in segments) != rendered:
            raise UserError("the chat template's text depends on what the messages say; use another template")
        return segments

    def tokenise(
        self, segments: Sequence[Segment], messages: Sequence[Message], placeholders: Sequence[int] = ()
    ) -> ChatTokens:
        ids: list[int] = []
        supervised: list[bool] = []
        num_images = 0
        answering = False  # the turn of an assistant is open: its text was said, its end mark not yet
        for piece, control in self._pieces(segments):
            if control is not None:
                if control == self.image_token_id:
                    count = placeholders[num_images] if num_images < len(placeholders) else 0
                    num_images += 1
                    ids += [control] * count
                    supervised += [False] * count
                else:
                    ids.append(control)
                    supervised.append(answering)
                answering = False
                continue
            encoding = self._encode("".join(segment.text for segment in piece), inner=bool(ids))
            ends: list[tuple[int, bool]] = []
            length = 0
            for segment in piece:
                length += len(segment.text)
                said = segment.message is not None and messages[segment.message]["role"] == "assistant"
                ends.append((length, said))
                if segment.message is not None:
                    answering = said
            ids += encoding.ids
            supervised += [next(said for end, said in ends if stop <= end) for _, stop in encoding.offsets]
        if num_images != len(placeholders):
            raise UserError(f"the chat template shows {num_images} images, and there are {len(placeholders)}")
        return ChatTokens(ids, supervised)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; control tokens in it are text."""
        ids: list[int] = self._encode(text).ids
        return ids

    def _encode(self, text: str, inner: bool = False) -> Any:
        try:
            return (self._inner if inner else self._plain).encode(text, add_special_tokens=False)
        except TypeError:
            raise UserError("a text holds half of a surrogate pair, which is no character") from None

    def _pieces(self, segments: Sequence[Segment]) -> list[tuple[list[Segment], int | None]]:
        """Control tokens of the template, and between them runs of ordinary text that must be tokenised as one."""
        pieces: list[tuple[list[Segment], int | None]] = []
        run: list[Segment] = []
        for segment in segments:
            if segment.message is not None:
                run.append(segment)
                continue
            text = segment.text
            while text:
                hits = [(text.find(token), -len(token), token) for token in self._control if token in text]
                start, _, token = min(hits) if hits else (len(text), 0, "")
                if start:
                    run.append(Segment(text[:start]))
                if token:
                    if run:
                        pieces.append((run, None))
                    pieces.append(([], self._control[token]))
                    run = []
                text = text[start + len(token) :]
        return [*pieces, (run, None)] if run else pieces

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
