"""A router's text service as it is watched: counted, traced and logged, whichever endpoint it serves."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from tandem_serve.interfaces import TextService
from tandem_serve.serving.metrics import RouterMetrics
from tandem_serve.serving.tracing import Tracing
from tandem_serve.tracing import spanning
from tandem_serve.types import ModelCard, TextDelta, TextRequest

_requests = logging.getLogger("tandem_serve.requests")


class ObservedTextService:
    """Passes a TextService's deltas on as they are. A request's own `traceparent` is its client's."""

    def __init__(self, service: TextService, metrics: RouterMetrics, tracing: Tracing) -> None:
        self._service = service
        self._metrics = metrics
        self._tracing = tracing

    async def models(self) -> list[ModelCard]:
        return await self._service.models()

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        tally = _Tally(self._metrics, request)
        parent = self._tracing.begin(request.traceparent)
        try:
            with spanning(self._tracing.sink, "completion", parent, tally.attributes) as context:
                request = replace(request, traceparent=None if context is None else str(context))
                async with aclosing(self._service.complete(request)) as deltas:
                    async for delta in deltas:
                        tally.add(delta)
                        yield delta
        except BaseException as error:
            tally.failed(error)
            raise
        tally.finished()


class _Tally:
    """What one request has brought so far."""

    def __init__(self, metrics: RouterMetrics, request: TextRequest) -> None:
        self.attributes: dict[str, str | int | float] = {"request_id": request.request_id, "n": request.n}
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last_at: dict[int, float] = {}  # each completion's latest step
        self._num_tokens = 0

    def add(self, delta: TextDelta) -> None:
        metrics, now = self._metrics, time.perf_counter()
        if delta.token_ids:
            if not self._last_at:
                metrics.first_token.observe(now - self._start)
                self.attributes["time_to_first_token_s"] = now - self._start
            if (before := self._last_at.get(delta.index)) is not None:
                metrics.inter_token_latency.observe(now - before)
            self._last_at[delta.index] = now
            self._num_tokens += len(delta.token_ids)
            metrics.generation_tokens.inc(len(delta.token_ids))
        if delta.finish_reason is not None and delta.usage is not None:
            metrics.finished.labels(delta.finish_reason.value).inc()
            metrics.prompt_tokens.inc(delta.usage.prompt_tokens)
            self.attributes["num_prompt_tokens"] = delta.usage.prompt_tokens
            self.attributes["finish_reason"] = delta.finish_reason.value
            self.attributes["num_tokens"] = self._num_tokens

    def finished(self) -> None:
        elapsed = max(self._last_at.values(), default=self._start) - self._start
        self._metrics.e2e_latency.observe(elapsed)
        _requests.info("request finished", extra={**self.attributes, "elapsed_s": round(elapsed, 6)})

    def failed(self, error: BaseException) -> None:
        self._metrics.count_error(error)
        kind = type(error).__name__
        _requests.info("request failed", extra={**self.attributes, "num_tokens": self._num_tokens, "error": kind})
