"""OpenTelemetry: which requests are traced, and how their spans leave a process. The engines know tracing.py alone.

Off by default. Off, or for a request that is not sampled, nothing here runs but one comparison a request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from tandem_serve.config import TracesConfig
from tandem_serve.errors import ConfigError
from tandem_serve.tracing import Span, SpanSink, TraceContext, discard

_EXPORT_INTERVAL_MS = 1000
_EXPORT_TIMEOUT_S = 2.0  # a collector that does not answer must not hold up a replica's end


class Tracing:
    """A process's way to its collector. `sink` takes spans from any thread, and drops them once the queue is full."""

    def __init__(
        self, sink: SpanSink = discard, *, sample_ratio: float | None = None, close: Callable[[], None] | None = None
    ) -> None:
        """sample_ratio None: nothing is traced."""
        self.sink = sink
        self._sample_ratio = sample_ratio
        self._close = close

    def begin(self, traceparent: str | None) -> TraceContext | None:
        """Whose child a request's first span is; None where the request is not traced.

        A caller's own trace is continued if it is sampled and left alone if not; without one, chance decides.
        """
        if self._sample_ratio is None:
            return None
        if traceparent and TraceContext.is_valid(traceparent):
            return TraceContext.parse(traceparent)
        return TraceContext.new_trace() if random.random() < self._sample_ratio else None

    def close(self) -> None:
        """Exports what is left. Blocks for a few seconds at most."""
        if self._close is not None:
            self._close()


def start_tracing(config: TracesConfig, pool: str, instance: str) -> Tracing:
    """A replica's tracing; off where there is no endpoint.

    Args:
        pool: router, primary or drafter: the service is tandem-<pool>.
        instance: tells one replica from another.

    Raises:
        ConfigError: the endpoint is no URL, or the exporter is not installed.
    """
    if config.endpoint is None:
        return Tracing()
    url = urlsplit(config.endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError(f"observability.traces.endpoint: {config.endpoint!r} is not like http://host:4317")
    sink, close = _otlp(config.endpoint, url.scheme == "http", pool, instance)
    return Tracing(sink, sample_ratio=config.sample_ratio, close=close)


def _otlp(endpoint: str, insecure: bool, pool: str, instance: str) -> tuple[SpanSink, Callable[[], None]]:
    """OTLP over gRPC. Headers and certificates come by OpenTelemetry's own environment variables."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
    except ImportError as error:
        raise ConfigError(f"observability.traces needs tandem-serve[traces]: {error}") from error
    resource = Resource.create({"service.name": f"tandem-{pool}", "service.instance.id": instance})
    scope = InstrumentationScope("tandem_serve")
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=_EXPORT_TIMEOUT_S)
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_INTERVAL_MS)
    kinds = {"completion": SpanKind.SERVER, "sequence": SpanKind.CLIENT, "primary": SpanKind.SERVER}

    def context_of(context: TraceContext, is_remote: bool = False) -> SpanContext:
        return SpanContext(context.trace_id, context.span_id, is_remote, TraceFlags(TraceFlags.SAMPLED))

    def sink(span: Span) -> None:
        to_wall_ns = time.time_ns() - time.monotonic_ns()
        kind = kinds.get(span.name, SpanKind.INTERNAL)
        processor.on_end(
            ReadableSpan(
                name=span.name,
                context=context_of(span.context),
                parent=context_of(span.parent, kind is SpanKind.SERVER) if span.parent.span_id else None,
                resource=resource,
                attributes=span.attributes,
                kind=kind,
                status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
                start_time=int(span.start_s * 1e9) + to_wall_ns,
                end_time=int(span.end_s * 1e9) + to_wall_ns,
                instrumentation_scope=scope,
            )
        )

    return sink, processor.shutdown
