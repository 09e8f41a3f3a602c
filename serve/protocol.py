"""OpenAI's chat and text completions: types and names are checked here, bounds where the engine checks them."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.engine import SamplingParams
from serve.errors import ApiError, ParameterError

MAX_MESSAGES = 1000
M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """Unknown fields are accepted; known ones have exactly their JSON type."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ImageUrl(Body):
    url: str
    detail: str | None = None


class Part(Body):
    type: str
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "Part":
        if self.type not in ("text", "image_url"):
            raise ValueError(f"a part is of type text or image_url, got {self.type[:40]!r}")
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type}")
        return self


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def parts(self) -> list[Part]:
        return [Part(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @model_validator(mode="after")
    def _has_images_where_they_may_be(self) -> "ChatMessage":
        if self.role != "user" and any(part.type == "image_url" for part in self.parts):
            raise ValueError(f"images belong into user messages; this one is a {self.role} message")
        return self


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingBody(Body):
    """What both kinds of completions share."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None

    def sampling(self, left: int) -> SamplingParams:
        """The sampling parameters; `left` tokens of the context are what an answer may have when nothing is said.

        Raises ParameterError naming value and bound.
        """
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")
            if getattr(self, name) is not None
        }
        if self.repetition_penalty is not None:
            given["repetition_penalty"] = self.repetition_penalty
        asked, name = self.asked_tokens()
        if asked is not None and asked < 1:
            raise ParameterError(name, f"{name} must be at least 1, got {asked}")
        return SamplingParams(
            max_tokens=max(1, left) if asked is None else asked,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logit_bias=_token_biases(self.logit_bias or {}),
            **self.logprob_settings(),
            **given,
        )

    def asked_tokens(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    def logprob_settings(self) -> dict[str, Any]:
        return {}

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None

    def asked_tokens(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    def logprob_settings(self) -> dict[str, Any]:
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs", "top_logprobs needs logprobs to be true")
        return {"logprobs": bool(self.logprobs), "top_logprobs": self.top_logprobs or 0}


class CompletionBody(SamplingBody):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = 16  # OpenAI's default for this route
    logprobs: int | None = None

    def logprob_settings(self) -> dict[str, Any]:
        if self.logprobs is not None and self.logprobs < 0:
            raise ParameterError("logprobs", f"logprobs must be at least 0, got {self.logprobs}")
        return {"logprobs": self.logprobs is not None, "top_logprobs": self.logprobs or 0}

    @property
    def prompts(self) -> list[str | list[int]]:
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [cast(list[int], self.prompt)]
            case prompts:
                return list(cast(list[str] | list[list[int]], prompts))


# what other servers can do and this one can't (yet): said, not ignored, since the answer would be another
UNSUPPORTED = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
}


def parse_body(kind: type[M], payload: Any) -> M:
    """A request body as `kind`; ApiError 400 naming the first thing that is wrong with it."""
    if not isinstance(payload, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_json_type(payload)}", code="invalid_body")
    for name, harmless in UNSUPPORTED.items():
        if name in payload and payload[name] not in harmless:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    wanted = payload.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type", "text") != "text":
        message = f"response_format {str(wanted['type'])[:40]!r} is not supported; only text is"
        raise ApiError(400, message, param="response_format", code="unsupported_parameter")
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        raise _explain(error, payload) from None


_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _explain(error: ValidationError, payload: Any) -> ApiError:
    """The first of the deepest errors: of the arms of a union, the one that got furthest knows best."""
    found = [(*_locate(detail["loc"], payload), detail) for detail in error.errors(include_url=False)]
    where, node, detail = max(found, key=lambda item: item[0].count(".") + item[0].count("["))
    expected = dict.fromkeys(_EXPECTED[d["type"]] for w, _, d in found if w == where and d["type"] in _EXPECTED)
    context = detail.get("ctx", {})
    if detail["type"] == "missing":
        message = "is required"
    elif expected:
        message = f"must be {' or '.join(expected)}, got {_shown(node)}"
    elif detail["type"] in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        side = "at least" if detail["type"] == "too_short" else "at most"
        message = f"must have {side} {bound} item{'s' * (bound != 1)}, got {len(node)}"
    elif detail["type"] == "literal_error":
        message = f"must be {context['expected']}, got {_shown(node)}"
    else:
        message = str(detail["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{where or 'the body'}: {message}", param=where or None, code="invalid_value")


def _locate(path: Sequence[int | str], payload: Any) -> tuple[str, Any]:
    """A path of pydantic's, which names arms of unions, too, as the client would write it, and what is there."""
    where, node = "", payload
    for index, part in enumerate(path):
        if isinstance(part, int) and isinstance(node, list):
            where, node = f"{where}[{part}]", node[part]
        elif isinstance(node, dict) and (part in node or index == len(path) - 1):
            where, node = (f"{where}.{part}" if where else str(part)), node.get(str(part))
    return where, node


def _shown(value: Any) -> str:
    return (
        repr(value)[:80] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else _json_type(value)
    )


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    for token in biases:
        if not re.fullmatch("-?[0-9]{1,18}", token):
            raise ParameterError("logit_bias", f"logit_bias maps token ids to numbers; {token[:40]!r} is no id")
    return {int(token): bias for token, bias in biases.items()}


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
