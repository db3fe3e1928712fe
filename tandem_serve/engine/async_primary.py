"""The primary engine behind asyncio: a thread that steps, and a stream a request."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import Protocol, Self

from tandem_serve.engine.sequence import Sink
from tandem_serve.engine.threads import yield_to_io
from tandem_serve.errors import RequestAborted, TandemError, Unavailable
from tandem_serve.types import FinishReason, GenerationRequest, GenerationStep, PrimaryInfo, PrimaryStatus

_log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 5  # in a row; with more a primary is no longer healthy
_PAUSE_AFTER_FAILURE_S = 0.1  # should the loop fail time and again, it must not fill a core and the log


class SteppedEngine(Protocol):
    """A primary engine that somebody else steps. torch_primary.py says what each method does, and on which thread."""

    num_failed_steps: int

    @property
    def info(self) -> PrimaryInfo: ...
    def submit(self, request: GenerationRequest, sink: Sink) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def set_drafters(self, addresses: Iterable[str]) -> None: ...
    def status(self) -> PrimaryStatus: ...
    def wait_until_idle(self, timeout_s: float) -> bool: ...
    def wake(self) -> None: ...
    def wait(self) -> None: ...
    def step(self) -> bool: ...
    def fail_all(self) -> None: ...
    def close(self) -> None: ...


class AsyncPrimary:
    """Runs an engine in a thread of its own (implements interfaces.Primary). `start` it, or use `async with`.

    Streams may live on any event loop. One that is not read keeps its steps in memory, max_tokens at most.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()  # the thread ends after its present step
        self._is_draining = False  # no new requests

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread is alive and its latest steps have not all failed. Any thread."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and self._engine.num_failed_steps < MAX_FAILED_STEPS

    async def info(self) -> PrimaryInfo:
        """See interfaces.Primary. Raises Unavailable unless healthy, for who asks is about to send requests."""
        self._check_health()
        return self._engine.info

    async def status(self) -> PrimaryStatus:
        """See interfaces.Primary. Raises Unavailable unless healthy."""
        self._check_health()
        return self._engine.status()

    def set_drafters(self, addresses: Iterable[str]) -> None:
        """The drafters that new sequences may use. Any thread."""
        self._engine.set_drafters(addresses)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """See interfaces.Primary.

        Raises:
            InvalidRequest, Overloaded: from the first step.
            Unavailable: the engine failed or is closing; the text can be continued elsewhere with the same seed.
            RequestAborted: somebody else aborted the request, or `close` did.
        """
        if self._thread is None or self._is_draining:
            raise Unavailable("this primary is not running" if self._thread is None else "this primary is closing")
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[GenerationStep | TandemError] = asyncio.Queue()
        self._engine.submit(request, lambda item: _hand_over(loop, items, item))
        is_finished = False
        try:
            while not is_finished:
                item = await items.get()
                is_finished = isinstance(item, TandemError) or item.finish_reason is not None
                if isinstance(item, TandemError):
                    raise item
                if item.finish_reason is FinishReason.ABORT:
                    raise RequestAborted(f"request {request.request_id} was aborted")
                yield item
        finally:
            if not is_finished:
                self._engine.abort(request.request_id)

    def start(self) -> None:
        """Starts the engine's thread."""
        if self._thread is not None:
            raise RuntimeError("this primary is running already")
        self._stopping.clear()
        self._is_draining = False
        self._thread = threading.Thread(target=self._loop, name="primary-engine", daemon=True)
        self._thread.start()

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Takes no new requests, gives running ones drain_timeout_s to finish, aborts the rest, ends the thread."""
        thread = self._thread
        if thread is None:
            return
        self._is_draining = True
        await asyncio.to_thread(self._engine.wait_until_idle, drain_timeout_s)
        self._stopping.set()
        self._engine.wake()
        await asyncio.to_thread(thread.join)
        self._thread = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _loop(self) -> None:
        """The engine's thread. An error outside a batch (an engine may fail a batch by itself) costs all requests."""
        yield_to_io()
        try:
            while not self._stopping.is_set():
                try:
                    if not self._engine.step():
                        self._engine.wait()
                except Exception:
                    _log.exception("the primary's loop failed; all its requests fail with it")
                    self._fail_all()
                    self._stopping.wait(_PAUSE_AFTER_FAILURE_S)
        finally:
            self._engine.close()  # whatever ended the loop: requests that come from here on are refused

    def _fail_all(self) -> None:
        """What is left because this fails, too, is tried again after the next step."""
        self._engine.num_failed_steps += 1
        try:
            self._engine.fail_all()
        except Exception:
            _log.exception("failing the primary's requests failed")

    def _check_health(self) -> None:
        if not self.is_healthy:
            raise Unavailable("this primary's engine does not run, or fails in every step; see its log")


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    items: asyncio.Queue[GenerationStep | TandemError],
    item: GenerationStep | TandemError,
) -> None:
    """From the engine's thread into a stream. Raises RuntimeError where its event loop has gone."""
    loop.call_soon_threadsafe(items.put_nowait, item)
