"""From the engine's thread to the event loops that wait for its deltas."""

import asyncio
from collections.abc import Callable

from serve.engine import Delta, Request
from serve.errors import EngineError

# None ends a request that was cancelled
Item = Delta | EngineError | None


class Mail:
    """The deltas of one request, as they arrive. Made on the event loop that reads them."""

    def __init__(self, request: Request, cancel: Callable[[str], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.request_id = request.id
        self.mailbox: asyncio.Queue[Item] = asyncio.Queue()
        self._cancel = cancel
        self._unfinished = request.n
        self._kept: list[Item] = []  # taken from the mailbox, but not of the delta that it was to be merged with

    def __aiter__(self) -> "Mail":
        return self

    async def __anext__(self) -> Delta:
        if not self._unfinished:
            raise StopAsyncIteration
        item = self._kept.pop() if self._kept else await self.mailbox.get()
        if not isinstance(item, Delta):
            self._unfinished = 0
            if item is None:
                raise StopAsyncIteration
            raise item
        if not self.mailbox.empty() and item.finish_reason is None:
            item = self._merge(item)
        self._unfinished -= item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Cancels the request if it hasn't finished."""
        if self._unfinished:
            self._unfinished = 0
            self._cancel(self.request_id)

    def _merge(self, delta: Delta) -> Delta:
        """What else has come for the same choice goes along: a slow reader gets fewer, larger deltas."""
        parts = [delta]
        while not self.mailbox.empty() and parts[-1].finish_reason is None:
            item = self.mailbox.get_nowait()
            if not isinstance(item, Delta) or item.choice != delta.choice:
                self._kept.append(item)
                break
            parts.append(item)
        return Delta(
            choice=delta.choice,
            token_ids=tuple(token for part in parts for token in part.token_ids),
            text="".join(part.text for part in parts),
            logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
            finish_reason=parts[-1].finish_reason,
            usage=parts[-1].usage,
        )


class Outbox:
    """What a step of the engine has said; delivered with one wake-up per event loop."""

    def __init__(self) -> None:
        self._letters: dict[asyncio.AbstractEventLoop, list[tuple[Mail, Item]]] = {}

    def put(self, mail: Mail, item: Item) -> None:
        self._letters.setdefault(mail.loop, []).append((mail, item))

    def deliver(self) -> set[str]:
        """Returns the requests that nobody listens to any more, since their loop was closed."""
        letters, self._letters = self._letters, {}
        lost: set[str] = set()
        for loop, items in letters.items():
            try:
                loop.call_soon_threadsafe(_drop_in, items)
            except RuntimeError:
                lost |= {mail.request_id for mail, _ in items}
        return lost


def _drop_in(letters: list[tuple[Mail, Item]]) -> None:
    for mail, item in letters:
        mail.mailbox.put_nowait(item)
