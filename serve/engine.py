"""The interface of an engine: requests of token ids and images go in, deltas of text come out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from serve.errors import ParameterError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
MAX_TOP_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_LOGIT_BIASES = 1024

# inclusive bounds
BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31 - 1),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 10),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, in OpenAI's terms (top_k, min_p and repetition_penalty as in Hugging Face's).

    temperature 0 is greedy: exactly the argmax. top_k 0 or -1 is off. Penalties of presence and frequency count what
    was generated, the repetition penalty counts the prompt, too. Raises ParameterError naming value and bound.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails every comparison
                raise ParameterError(name, f"{name} must be between {low} and {high}, got {value}")
        if self.top_p == 0.0:
            raise ParameterError("top_p", "top_p must be above 0, got 0")
        if len(self.stop) > MAX_STOPS:
            raise ParameterError("stop", f"stop takes up to {MAX_STOPS} strings, got {len(self.stop)}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                message = f"a stop string has 1 to {MAX_STOP_LENGTH} characters, got one of {len(text)}"
                raise ParameterError("stop", message)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            message = f"logit_bias takes up to {MAX_LOGIT_BIASES} tokens, got {len(self.logit_bias)}"
            raise ParameterError("logit_bias", message)
        for token, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                message = f"logit_bias of token {token} must be between -100 and 100, got {bias}"
                raise ParameterError("logit_bias", message)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True)
class ImageInput:
    """A preprocessed image: the processor's tensors, a content key that only these pixels have, and how many image
    tokens stand for it in the prompt."""

    pixels: Mapping[str, "torch.Tensor"]
    key: str
    placeholders: int


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it, n times. deadline: in time.monotonic() seconds.

    stream False asks for one delta per choice, when it is complete.
    """

    id: str
    input_ids: Sequence[int]
    images: Sequence[ImageInput] = ()
    sampling: SamplingParams = SamplingParams()
    adapter: str | None = None
    n: int = 1
    deadline: float | None = None
    stream: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probabilities under the model itself, before penalties and temperature; `top` is sorted."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """What was added to a choice. finish_reason and usage come with the choice's last delta."""

    choice: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class ModelInfo:
    """name: what clients call the model; context_length: prompt and answer together; max_choices: largest n."""

    name: str
    context_length: int
    vocab_size: int
    max_choices: int


class Deltas(Protocol):
    """The deltas of one request. Closing them early cancels the request."""

    def __aiter__(self) -> "Deltas": ...

    async def __anext__(self) -> Delta: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """Makes tokens. All methods are called from the event loop's thread."""

    @property
    def info(self) -> ModelInfo: ...

    def start(self) -> None:
        """Begins to work. Raises UserError when the model can't be served by this engine."""

    def stop(self) -> None:
        """Ends all requests with EngineStoppedError and returns when the engine has come to rest."""

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""

    def submit(self, request: Request) -> Deltas:
        """Queues a request at once; its deltas come until every choice has finished.

        Raises QueueFullError, EngineStoppedError or ParameterError here, an EngineError while iterating.
        """

    def cancel(self, request_id: str) -> None:
        """Drops a request before the next step; its iterator ends. Unknown ids are ignored."""

    async def score(self, input_ids: Sequence[int], images: Sequence[ImageInput], continuation: Sequence[int]) -> float:
        """Sum of the natural log-probabilities of `continuation` after the prompt."""
