"""Who may use the primaries now, who waits, and who is told to come back later: overload, shared fairly by clients.

A router lets in as many completions as the primaries can carry at once. The others wait here, not in an engine's queue,
for here it is known whose they are. Both queues are bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from tandem_serve.config import AdmissionConfig
from tandem_serve.errors import DeadlineExceeded, Overloaded
from tandem_serve.interfaces import TextService
from tandem_serve.types import ModelCard, TextDelta, TextRequest

T = TypeVar("T")

_RETRY_AFTER_S = (1.0, 60.0)  # what a client is told, at least and at most
_RETRY_SPACING_S = 0.02  # between two that are told to come back, at least
_SMOOTHING = 0.1  # of the mean time between two ends: about the last ten count


@dataclass(eq=False, slots=True)
class _Waiter:
    client: str
    size: int
    granted: asyncio.Future[None]


class Admission:
    """Counts completions: a request of n counts n. Belongs to one event loop.

    Of the clients that wait, the one with the least running comes next; of equals the one that came longest ago. So a
    client with one request is served soon, however many another one has sent. Where the queue is full, a client that
    has more in it than the newcomer gives up its newest request.
    """

    def __init__(
        self,
        config: Callable[[], AdmissionConfig],
        num_primaries: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`config` and `num_primaries` are asked anew each time: both change while requests run."""
        self._config = config
        self._num_primaries = num_primaries
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._queues: dict[str, deque[_Waiter]] = {}  # of clients that wait; ordered by their latest turn
        self._ended_at_s: float | None = None
        self._seconds_per_end = 0.0
        self._next_retry_s = 0.0  # when the next one that is refused may come back

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_queued(self) -> int:
        return sum(self._num_queued(client) for client in self._queues)

    async def acquire(self, client: str, size: int) -> None:
        """Waits for the turn of `size` completions, which count as running from then on until `release`.

        Raises:
            Overloaded: the queue is full, or became so in favour of others. There is nothing to release then.
        """
        self.refresh()
        if self._queues or not self._has_room(size):
            await self._wait(client, size)
        else:
            self._running[client] += size

    def release(self, client: str, size: int) -> None:
        """They have ended, however."""
        self._running[client] -= size
        if not self._running[client]:
            del self._running[client]
        now = self._clock()
        if self._ended_at_s is not None:
            seconds = (now - self._ended_at_s) / size
            self._seconds_per_end += _SMOOTHING * (seconds - self._seconds_per_end)
        self.refresh()
        # Only while somebody waits does the time from one end to the next tell anything of the capacity.
        self._ended_at_s = now if self._queues else None

    async def _wait(self, client: str, size: int) -> None:
        self._make_room(client, size)
        waiter = _Waiter(client, size, asyncio.get_running_loop().create_future())
        self._queues.setdefault(client, deque()).append(waiter)
        try:
            # Shielded, for a task that is cancelled would cancel this at once but hear of it later: meanwhile it may be
            # its turn, which it then has to give back.
            await asyncio.shield(waiter.granted)
        except asyncio.CancelledError:  # its client has gone, or its time is up
            if not waiter.granted.done():
                self._drop(waiter)
            elif waiter.granted.exception() is None:  # granted in the very moment
                self.release(client, size)
            raise

    def _make_room(self, client: str, size: int) -> None:
        """Makes sure that the queue can take a request. Raises Overloaded where it cannot."""
        config = self._config()
        own = self._num_queued(client) + size
        if own > config.max_queued_per_client:
            wait_s = self._retry_after_s(reserves=False)  # its own affair: nobody else has to come back later for it
            raise Overloaded("this client has too many requests waiting", retry_after_s=wait_s)
        for victim in self._victims(config.max_queued - size, own):
            self._drop(victim)
            victim.granted.set_exception(
                Overloaded("the queue is full, and others wait for less", retry_after_s=self._retry_after_s())
            )

    def _victims(self, max_queued: int, own: int) -> list[_Waiter]:
        """Who has to go for so many to remain: the newest of who has most, and more than a newcomer would have.

        Raises Overloaded where that is not enough; then nobody goes.
        """
        newest_first = {client: reversed(queue) for client, queue in self._queues.items()}
        sizes = {client: self._num_queued(client) for client in self._queues}
        victims = []
        while sum(sizes.values()) > max_queued:
            greediest = max(sizes, key=sizes.__getitem__, default=None)
            if greediest is None or sizes[greediest] <= own:
                raise Overloaded("the queue is full", retry_after_s=self._retry_after_s())
            victims.append(next(newest_first[greediest]))
            sizes[greediest] -= victims[-1].size
        return victims

    def refresh(self) -> None:
        """Lets in whom there is room for: to be called when there are more primaries, or they may take more."""
        while self._queues:
            client = min(self._queues, key=lambda each: self._running[each])  # the first of equals
            waiter = self._queues[client][0]
            if not self._has_room(waiter.size):
                return
            self._drop(waiter)
            if client in self._queues:
                self._queues[client] = self._queues.pop(client)  # to the end of the line
            self._running[client] += waiter.size
            waiter.granted.set_result(None)

    def _drop(self, waiter: _Waiter) -> None:
        queue = self._queues[waiter.client]
        queue.remove(waiter)
        if not queue:
            del self._queues[waiter.client]

    def _has_room(self, size: int) -> bool:
        """Whatever its size, a request may run alone."""
        capacity = self._config().per_primary * max(self._num_primaries(), 1)
        return not self.num_running or self.num_running + size <= capacity

    def _num_queued(self, client: str) -> int:
        return sum(waiter.size for waiter in self._queues.get(client, ()))

    def _retry_after_s(self, *, reserves: bool = True) -> float:
        """About how long it takes until what waits now has been let in, and those who were told to come back before.

        So they do not all come back at once, to be refused again: that would take the time of those that run.
        """
        least, most = _RETRY_AFTER_S
        now = self._clock()
        wait_s = max(self.num_queued * self._seconds_per_end, self._next_retry_s - now, least)
        at_s = now + min(wait_s, most)
        if reserves:
            self._next_retry_s = at_s + max(self._seconds_per_end, _RETRY_SPACING_S)
        return at_s - now


class AdmittedTextService:
    """A TextService behind an Admission, which also ends requests whose time is up, wherever they are."""

    def __init__(self, service: TextService, admission: Admission, *, timeout_s: float | None = None) -> None:
        """timeout_s: of requests that name none."""
        self._service = service
        self._admission = admission
        self._timeout_s = timeout_s

    async def models(self) -> list[ModelCard]:
        return await self._service.models()

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See interfaces.TextService. Raises DeadlineExceeded as well."""
        timeouts = [each for each in (request.timeout_s, self._timeout_s) if each is not None]
        deadline = asyncio.get_running_loop().time() + min(timeouts) if timeouts else None
        await _before(deadline, self._admission.acquire(request.client, request.n))
        try:
            left = None if deadline is None else max(deadline - asyncio.get_running_loop().time(), 0.001)
            async with aclosing(self._service.complete(replace(request, timeout_s=left))) as deltas:
                while (delta := await _before(deadline, anext(deltas, None))) is not None:
                    yield delta
        finally:
            self._admission.release(request.client, request.n)


async def _before(deadline: float | None, work: Awaitable[T]) -> T:
    """Awaits work until the deadline, an event loop's time. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout_at(deadline) as timeout:
            result = await work
    except TimeoutError as error:
        if timeout.expired():
            raise DeadlineExceeded("the request's time is up") from error
        raise
    return result
