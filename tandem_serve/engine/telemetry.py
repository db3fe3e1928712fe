"""What a primary's engine tells of each request's way: latencies as metrics and, where it is traced, spans."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tandem_serve.engine.sequence import Sequence, SequenceTrace
from tandem_serve.metrics import PrimaryMetrics
from tandem_serve.tracing import Span, SpanSink
from tandem_serve.types import FinishReason

_requests = logging.getLogger("tandem_serve.requests")


class RequestTelemetry:
    """Told of every request's admission, steps and end, on the engine's thread. Decides nothing."""

    def __init__(self, metrics: PrimaryMetrics, spans: SpanSink, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._spans = spans
        self._clock = clock

    def admitted(self, sequence: Sequence) -> None:
        """It has memory, and its prompt is run from now on."""
        now = self._clock()
        self._metrics.queue_time.observe(now - sequence.arrived_at_s)
        if sequence.trace is not None:
            sequence.trace.begin_round(now)

    def emitted(self, sequence: Sequence, num_tokens: int, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """A step has added tokens to it (sequence.token_ids has them already)."""
        now = self._clock()
        is_first = sequence.last_token_at_s is None
        if sequence.last_token_at_s is None:
            sequence.first_token_at_s = now
            self._metrics.time_to_first_token.observe(now - sequence.arrived_at_s)
        else:
            self._metrics.inter_token_latency.observe(now - sequence.last_token_at_s)
        sequence.last_token_at_s = now
        self._metrics.generation_tokens.inc(num_tokens)
        if num_draft_tokens:
            self._metrics.count_block(num_draft_tokens, num_accepted_tokens)
        if sequence.trace is not None:
            self._end_round(sequence.trace, now, is_first, num_tokens, num_draft_tokens, num_accepted_tokens)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """It leaves the engine, for whatever reason. Latencies are of those that came to their own end."""
        self._metrics.finished.labels(reason.value).inc()
        num_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
        attributes: dict[str, str | int] = {
            "request_id": sequence.request.request_id,
            "num_prompt_tokens": sequence.num_prompt_tokens,
            "num_tokens": num_tokens,
            "finish_reason": reason.value,
        }
        _requests.info("sequence ended", extra=attributes)
        if (trace := sequence.trace) is not None:
            now = self._clock()
            self._spans(Span("primary", trace.context, trace.parent, sequence.arrived_at_s, now, attributes))
        last = sequence.last_token_at_s
        if reason is FinishReason.ABORT or last is None:
            return
        self._metrics.e2e_latency.observe(last - sequence.arrived_at_s)
        if num_tokens > 1:
            self._metrics.time_per_output_token.observe((last - sequence.first_token_at_s) / (num_tokens - 1))

    def _end_round(
        self, trace: SequenceTrace, now: float, is_first: bool, num_tokens: int, num_drafts: int, num_accepted: int
    ) -> None:
        """The span of what led to these tokens: the prompt's pass, or a round from its request for drafts on."""
        context = trace.round or trace.context.child()  # without a request, a round begins where the last one ended
        attributes: dict[str, int | str] = {"num_tokens": num_tokens}
        if not is_first:
            attributes |= {"num_draft_tokens": num_drafts, "num_accepted_tokens": num_accepted}
            if not num_drafts:
                attributes["without_draft"] = trace.why_alone
        name = "prefill" if is_first else "round"
        self._spans(Span(name, context, trace.context, trace.round_began_s, now, attributes))
        trace.round = None
        trace.round_began_s = now
