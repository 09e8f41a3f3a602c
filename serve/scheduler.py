"""Who runs, who waits, who is done: requests and their rows, without a model."""

from collections import deque
from collections.abc import Callable, Iterable

from serve.detokenizer import Detokenizer
from serve.engine import Delta, FinishReason, Request, TokenLogprob, Usage
from serve.errors import DeadlineError, EngineError
from serve.sampling import Choice, Sampler
from vlm import Visual

# a delta, the error that ends the request, or None when it was cancelled
Sink = Callable[[Delta | EngineError | None], None]


class Ticket:
    """A request in the engine and where its deltas go."""

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request, self.sink = request, sink
        self.ended = False
        self.unfinished = request.n

    def end(self, error: EngineError | None) -> None:
        """No more deltas: the request failed, or was cancelled (None)."""
        if not self.ended:
            self.ended = True
            self.sink(error)


class Row:
    """One choice of a request while it runs; `position` counts its tokens in the key-value cache."""

    def __init__(
        self, ticket: Ticket, choice: int, sampler: Sampler, detokenizer: Detokenizer, media: Visual | None
    ) -> None:
        self.ticket, self.choice, self.sampler, self.detokenizer = ticket, choice, sampler, detokenizer
        self.media = media
        self.position = len(ticket.request.input_ids)
        self.last_token = -1
        self.generated = 0
        self.finished = False
        self._ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def done(self) -> bool:
        return self.finished or self.ticket.ended

    def accept(self, choice: Choice, eos_ids: frozenset[int]) -> None:
        """Takes the next token, and hands on what is certain of the text."""
        request, token_id = self.ticket.request, choice.token_id
        self.last_token = token_id
        self.generated += 1
        self.sampler.observe(token_id)
        at_end = token_id in eos_ids
        text = "" if at_end else self.detokenizer.push(token_id)
        reason: FinishReason | None = "stop" if at_end or self.detokenizer.stopped else None
        if reason is None and self.generated >= request.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += self.detokenizer.finish()
            reason = "stop" if self.detokenizer.stopped else reason
        self._ids.append(token_id)
        self._text.append(text)
        if choice.logprob is not None:
            self._logprobs.append(choice.logprob)
        self.finished = reason is not None
        if request.stream or self.finished:
            self._emit(reason)

    def _emit(self, reason: FinishReason | None) -> None:
        usage = Usage(len(self.ticket.request.input_ids), self.generated) if reason else None
        text, logprobs = "".join(self._text), tuple(self._logprobs)
        self.ticket.sink(Delta(self.choice, tuple(self._ids), text, logprobs, reason, usage))
        self._ids, self._text, self._logprobs = [], [], []
        if reason:
            self.ticket.unfinished -= 1
            self.ticket.ended = self.ticket.unfinished == 0


class Scheduler:
    """First come, first served into a bounded number of rows; row i of `running` is row i of the cache."""

    def __init__(self, max_rows: int, prefill_tokens: int) -> None:
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.waiting: deque[Ticket] = deque()
        self.running: list[Row] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def tickets(self) -> Iterable[Ticket]:
        return dict.fromkeys([*self.waiting, *(row.ticket for row in self.running)])

    def cancel(self, request_id: str) -> None:
        for ticket in self.tickets():
            if ticket.request.id == request_id:
                ticket.end(None)

    def expire(self, now: float) -> None:
        for ticket in self.tickets():
            if ticket.request.deadline is not None and now >= ticket.request.deadline:
                ticket.end(DeadlineError("the request's deadline has passed"))

    def admit(self) -> list[Ticket]:
        """Takes waiting requests whose prompts can be read in one forward and whose choices have rows to run in."""
        admitted: list[Ticket] = []
        free, longest = self.max_rows - len(self.running), 0
        while self.waiting:
            ticket = self.waiting[0]
            if ticket.ended:
                self.waiting.popleft()
                continue
            longest = max(longest, len(ticket.request.input_ids))
            too_much = longest * (len(admitted) + 1) > self.prefill_tokens
            if ticket.request.n > free or (admitted and too_much):
                break
            free -= ticket.request.n
            admitted.append(self.waiting.popleft())
        return admitted

    def retire(self) -> list[tuple[int, int, int]]:
        """Forgets rows that are done. Running rows stay dense: returns (source, target, length) of rows to be moved."""
        moves: list[tuple[int, int, int]] = []
        for index in reversed([i for i, row in enumerate(self.running) if row.done]):
            last = self.running.pop()
            if index < len(self.running):
                moves.append((len(self.running), index, last.position))
                self.running[index] = last
        return moves
