"""From deltas to OpenAI's answers: whole, or as a stream of chunks."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from serve.engine import Delta, TokenLogprob, Usage

Json = dict[str, Any]


@dataclass
class Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason


class TokenNames:
    """Text and bytes of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = _bytes_of_characters()
        state = tokenizer.backend_tokenizer.decoder
        self._byte_level = "ByteLevel" in str(state)

    def text(self, token_id: int) -> str:
        text: str = self._tokenizer.decode([token_id])
        return text

    def bytes(self, token_id: int) -> list[int]:
        """What the token adds to a text; half a character is no text, but is some bytes."""
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._byte_level and all(character in self._bytes for character in name):
            return [self._bytes[character] for character in name]
        return list(self.text(token_id).encode())


class Answer:
    """Turns deltas of one HTTP request into its JSON. `chat` tells the two routes' forms apart."""

    def __init__(self, model: str, choices: int, chat: bool, names: TokenNames, with_logprobs: bool) -> None:
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.model, self.chat, self.names, self.with_logprobs = model, chat, names, with_logprobs
        self.choices = [Choice() for _ in range(choices)]
        self.usage = Usage(0, 0)

    def add(self, delta: Delta, choice: int, counts_prompt: bool) -> None:
        """Takes a delta of a choice; the prompt is counted once, however many choices continue it."""
        self.choices[choice].add(delta)
        if delta.usage is not None:
            prompt = delta.usage.prompt_tokens if counts_prompt else 0
            self.usage = Usage(
                self.usage.prompt_tokens + prompt, self.usage.completion_tokens + delta.usage.completion_tokens
            )

    def whole(self) -> Json:
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._head(kind), "choices": choices, "usage": self.usage_json()}

    def opening(self) -> Iterable[Json]:
        """Chat streams open with the role, once per choice."""
        for index in range(len(self.choices) if self.chat else 0):
            yield self._chunk([self._piece(index, {"role": "assistant", "content": ""}, (), None)])

    def chunk(self, choice: int, delta: Delta) -> Json | None:
        """The chunk for a delta; None when it has nothing to show yet."""
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return None
        content: Json = {"content": delta.text} if delta.text or delta.logprobs else {}
        said = content if self.chat else {"text": delta.text}
        return self._chunk([self._piece(choice, said, delta.logprobs, delta.finish_reason)])

    def closing(self) -> Json:
        return {**self._chunk([]), "usage": self.usage_json()}

    def usage_json(self) -> Json:
        prompt, completion = self.usage.prompt_tokens, self.usage.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}

    def _choice(self, index: int, choice: Choice) -> Json:
        text = "".join(choice.text)
        said: Json = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        )
        logprobs = self._logprobs(choice.logprobs) if self.with_logprobs else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _piece(self, index: int, content: Json, logprobs: Sequence[TokenLogprob], reason: str | None) -> Json:
        said = {"delta": content} if self.chat else content
        shown = self._logprobs(logprobs) if logprobs and self.with_logprobs else None
        return {"index": index, **said, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, items: Sequence[TokenLogprob]) -> Json:
        if self.chat:
            tokens = [
                {**self._token(item.token_id, item.logprob), "top_logprobs": [self._token(*pair) for pair in item.top]}
                for item in items
            ]
            return {"content": tokens, "refusal": None}
        return {
            "tokens": [self.names.text(item.token_id) for item in items],
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [{self.names.text(token): value for token, value in item.top} for item in items],
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        # JSON has no infinity; OpenAI says -9999 for what can't happen
        value = max(logprob, -9999.0)
        return {"token": self.names.text(token_id), "logprob": value, "bytes": self.names.bytes(token_id)}


def _bytes_of_characters() -> dict[str, int]:
    """The characters by which byte-level tokenizers (GPT-2's) write bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
