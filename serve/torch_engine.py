"""The embedded engine: continuous batching over one model in this process."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import torch

from serve.detokenizer import Detokenizer, make_decode
from serve.engine import Deltas, ImageInput, ModelInfo, Request
from serve.errors import EngineError, EngineStoppedError, ParameterError, QueueFullError, RequestError
from serve.mail import Mail, Outbox
from serve.runner import ModelRunner, Prompt
from serve.sampling import Choice, Sampler, sample
from serve.scheduler import Row, Scheduler, Ticket
from vlm import VisionLanguageModel, VisionLanguageProcessor

log = logging.getLogger("serve.engine")


class TorchEngine:
    """One thread owns the model. Requests join and leave between steps; a step is one forward of all running rows.

    max_batch: rows that run at once; max_waiting: requests that may wait for a row; prefill_tokens: prompt tokens,
    padding included, that one forward reads (a longer prompt is read alone); image_cache_bytes: bound of the image
    cache. Raises UserError for models whose layers keep more than keys and values.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VisionLanguageProcessor,
        name: str,
        max_batch: int = 16,
        max_waiting: int = 128,
        prefill_tokens: int = 2048,
        image_cache_bytes: int = 256 * 2**20,
    ) -> None:
        self.runner = ModelRunner(model, max_batch, image_cache_bytes)
        self.scheduler = Scheduler(max_batch, prefill_tokens)
        self.max_waiting = max_waiting
        self._info = ModelInfo(name, self.runner.context_length, self.runner.vocab_size, max_batch)
        self._decode_ids = make_decode(processor.tokenizer)
        self._eos_ids = find_eos_ids(model, processor)
        self._rows_changed = False
        self._outbox = Outbox()
        # `_wake` guards what the event loop's thread and the engine's thread share: the three names below it
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._unread = 0
        self._open = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def alive(self) -> bool:
        return self._open and self._thread.is_alive()

    def start(self) -> None:
        self.runner.probe()
        self._open = True
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._open = False
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, request: Request) -> Deltas:
        self._check(request)
        mail = Mail(request, self.cancel)
        ticket = Ticket(request, partial(self._outbox.put, mail))
        with self._wake:
            if len(self.scheduler.waiting) + self._unread >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests are waiting already")
            self._post(lambda: self.scheduler.waiting.append(ticket))
            self._unread += 1
        return mail

    def cancel(self, request_id: str) -> None:
        with self._wake:
            if self._open:
                self._post(lambda: self.scheduler.cancel(request_id))

    async def score(self, input_ids: Sequence[int], images: Sequence[ImageInput], continuation: Sequence[int]) -> float:
        if not continuation:
            raise ParameterError("continuation", "there is nothing to score: the continuation is empty")
        self._check_prompt(input_ids, images, len(continuation))
        loop = asyncio.get_running_loop()
        result: asyncio.Future[float] = loop.create_future()

        def settle(value: float | EngineError) -> None:
            if result.done():  # whoever asked has gone
                return
            if isinstance(value, EngineError):
                result.set_exception(value)
            else:
                result.set_result(value)

        def work() -> None:
            value: float | EngineError
            try:
                value = self.runner.score(Prompt(input_ids, self.runner.encode(images)), continuation)
            except Exception as error:  # whatever a model raises: it is logged, this request told, the others go on
                log.exception("scoring failed")
                value = _failure(error)
            loop.call_soon_threadsafe(settle, value)

        with self._wake:
            self._post(work)
        return await result

    def _post(self, job: Callable[[], None]) -> None:
        """Has a job done by the engine's thread before its next step; to be called with `_wake` held."""
        if not self._open:
            raise EngineStoppedError("the engine is not running")
        self._inbox.append(job)
        self._wake.notify()

    def _check(self, request: Request) -> None:
        limit = self._info.max_choices
        if not 1 <= request.n <= limit:
            raise ParameterError("n", f"n must be between 1 and {limit}, got {request.n}")
        if request.adapter is not None:
            raise ParameterError("model", f"there is no adapter {request.adapter!r}", code="model_not_found")
        for token in request.sampling.logit_bias:
            if not 0 <= token < self._info.vocab_size:
                message = f"logit_bias names token {token}, but ids go from 0 to {self._info.vocab_size - 1}"
                raise ParameterError("logit_bias", message)
        self._check_prompt(request.input_ids, request.images, request.sampling.max_tokens)

    def _check_prompt(self, input_ids: Sequence[int], images: Sequence[ImageInput], more: int) -> None:
        prompt, limit = len(input_ids), self._info.context_length
        if not prompt:
            raise ParameterError("prompt", "the prompt is empty")
        if prompt + more > limit:
            message = f"the prompt has {prompt} tokens and max_tokens is {more}: together over the context of {limit}"
            raise ParameterError("max_tokens", message, code="context_length_exceeded")
        strange = next((token for token in input_ids if not 0 <= token < self._info.vocab_size), None)
        if strange is not None:
            message = f"the prompt has token {strange}, but ids go from 0 to {self._info.vocab_size - 1}"
            raise ParameterError("prompt", message)
        found = sum(1 for token in input_ids if token == self.runner.config.image_token_id)
        needed = sum(image.placeholders for image in images)
        if found != needed:
            message = f"the prompt has {found} image tokens, but {len(images)} images need {needed}"
            raise ParameterError("prompt", message)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._take_jobs():
                self.scheduler.expire(time.monotonic())
                self._retire()
                admitted = self.scheduler.admit()
                if admitted:
                    self._prefill(admitted)
                    self._deliver()
                if self.scheduler.running:
                    self._decode()
                self._deliver()
        except Exception:  # a thread that ends in silence leaves its requests waiting: they are told below
            log.exception("the engine has failed")
        finally:
            with self._wake:
                self._open = False
                jobs, self._inbox = self._inbox, []
            for job in jobs:
                job()
            for ticket in self.scheduler.tickets():
                ticket.end(EngineStoppedError("the engine has stopped"))
            self._outbox.deliver()

    def _take_jobs(self) -> bool:
        """Does what was posted, and sleeps while there is nothing to do. False when the engine is to stop."""
        with self._wake:
            while self._open and not self._inbox and self.scheduler.idle:
                self._wake.wait()
            jobs, self._inbox, self._unread = self._inbox, [], 0
            running = self._open
        for job in jobs:
            job()
        return running

    def _prefill(self, tickets: list[Ticket]) -> None:
        """Reads the prompts of requests that were admitted, and starts their rows with their first token."""
        first = len(self.scheduler.running)
        try:
            rows, logits = self._start(tickets, first)
        except Exception as error:  # whatever a model raises: one request alone is told, several are tried one by one
            self.runner.rows.clear_rows(first, sum(ticket.request.n for ticket in tickets))
            if len(tickets) == 1:
                log.exception("request %s failed", tickets[0].request.id)
                tickets[0].end(_failure(error))
                return
            for ticket in tickets:  # one of them is the culprit; the others go on
                self._prefill([ticket])
            return
        self.scheduler.running += rows
        self._rows_changed = True
        self._advance(rows, logits, first)

    def _start(self, tickets: list[Ticket], first: int) -> tuple[list[Row], torch.Tensor]:
        """The rows of new requests, kept in the cache from row `first` on, and the logits of their first tokens."""
        images = iter(self.runner.encode([image for ticket in tickets for image in ticket.request.images]))
        prompts = [Prompt(t.request.input_ids, list(islice(images, len(t.request.images)))) for t in tickets]
        logits = self.runner.prefill(prompts, first)  # [len(tickets), V]
        rows = [self._make_row(ticket, 0, prompt) for ticket, prompt in zip(tickets, prompts, strict=True)]
        source = list(range(len(tickets)))
        for index, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
            for choice in range(1, ticket.request.n):
                self.runner.rows.copy_row(first + index, first + len(rows), len(prompt.input_ids))
                rows.append(self._make_row(ticket, choice, prompt))
                source.append(index)
        return rows, logits[source]

    def _decode(self) -> None:
        rows = self.scheduler.running
        try:
            if self._rows_changed:
                self.runner.show([row.media for row in rows])
                self._rows_changed = False
            logits = self.runner.decode([row.last_token for row in rows], [row.position for row in rows])
        except Exception as error:
            log.exception("a decoding step failed; its %d rows are lost", len(rows))
            for row in rows:
                row.ticket.end(_failure(error))
            self.runner.rows.clear_rows(0, len(rows))
            return
        for row in rows:
            row.position += 1
        self._advance(rows, logits, 0)

    def _advance(self, rows: list[Row], logits: torch.Tensor, first: int) -> None:
        """Gives each row, kept in the cache from row `first` on, its next token."""
        for index, (row, choice) in enumerate(zip(rows, self._sample(rows, logits), strict=True)):
            if row.done:  # another choice of its request has failed
                continue
            try:
                if not choice.finite:
                    raise ArithmeticError("the model gave non-finite logits")
                row.accept(choice, self._eos_ids)
            except Exception as error:
                log.exception("request %s failed", row.ticket.request.id)
                row.ticket.end(_failure(error))
                self.runner.rows.clear_rows(first + index, 1)
        self._retire()

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> list[Choice]:
        """The rows' next tokens. One that fails gets none, and the others get theirs."""
        try:
            return sample(logits, [row.sampler for row in rows])
        except Exception:
            if len(rows) == 1:
                log.exception("request %s could not be sampled", rows[0].ticket.request.id)
                return [Choice(token_id=-1, finite=False)]
            return [choice for i, row in enumerate(rows) for choice in self._sample([row], logits[i : i + 1])]

    def _retire(self) -> None:
        if any(row.done for row in self.scheduler.running):
            for source, target, length in self.scheduler.retire():
                self.runner.rows.copy_row(source, target, length)
            self._rows_changed = True

    def _deliver(self) -> None:
        for request_id in self._outbox.deliver():
            self.scheduler.cancel(request_id)

    def _make_row(self, ticket: Ticket, choice: int, prompt: Prompt) -> Row:
        request = ticket.request
        sampler = Sampler(request.sampling, request.input_ids, self._info.vocab_size, choice, self.runner.device)
        detokenizer = Detokenizer(self._decode_ids, request.sampling.stop)
        return Row(ticket, choice, sampler, detokenizer, self.runner.media_of(prompt.visuals))


def _failure(error: Exception) -> RequestError:
    """What a request is told; its cause is for whoever runs the engine."""
    failure = RequestError("the model failed on this request")
    failure.__cause__ = error
    return failure


def find_eos_ids(model: VisionLanguageModel, processor: VisionLanguageProcessor) -> frozenset[int]:
    """Ids that end an answer: those that `generate` stops at, and the tokenizer's."""
    settings = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = settings if isinstance(settings, list) else [settings]
    return frozenset(int(token) for token in [*ids, processor.tokenizer.eos_token_id] if token is not None)
