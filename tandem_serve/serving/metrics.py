"""What a router exports to Prometheus: its own counters, and those of the replicas that it can ask.

vLLM's names where one exists, `tandem:` for what is ours. Raw counters only; ratios are queries, e.g. the mean
acceptance length
`1 + rate(vllm:spec_decode_num_accepted_tokens_total[1m]) / rate(vllm:spec_decode_num_drafts_total[1m])`.
A router counts the requests that went through it; of what a replica counts too, only the router's figure is exported.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tandem_serve.interfaces import TextService
from tandem_serve.serving.router import ClusterOverview
from tandem_serve.types import ModelCard, TextDelta, TextRequest

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServingMetrics:
    """The counters of one router. Not process-wide: each instance has its own registry."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=self._registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ("model_name", *labels), registry=self._registry)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished completions.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._finished = counter("vllm:request_success", "Finished completions.", "finished_reason")
        self._drafts = counter("vllm:spec_decode_num_drafts", "Steps that verified drafts.")
        self._draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Drafts verified.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafts accepted.")
        self._accepted_at = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by place in their block.", "position"
        )
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request to its first token.",
            ("model_name",),
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._running = gauge("vllm:num_requests_running", "Sequences in a primary's batch.", "primary")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences queued at a primary.", "primary")
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of a primary's KV budget in use, 0 to 1.", "primary")
        self._pairs = gauge("tandem:num_sequences_paired", "This router's sequences paired with a drafter.", "drafter")
        self._links = gauge("tandem:num_linked_primaries", "Primaries with a ready link to a drafter.", "drafter")

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.labels(self._model_name).observe(seconds)

    def observe(self, delta: TextDelta) -> None:
        """Counts one delta."""
        name = self._model_name
        self._generation_tokens.labels(name).inc(len(delta.token_ids))
        if delta.num_draft_tokens:
            self._drafts.labels(name).inc()
            self._draft_tokens.labels(name).inc(delta.num_draft_tokens)
            self._accepted.labels(name).inc(delta.num_accepted_tokens)
            for position in range(delta.num_accepted_tokens):
                self._accepted_at.labels(name, str(position)).inc()
        if delta.finish_reason is not None and delta.usage is not None:
            self._finished.labels(name, delta.finish_reason.value).inc()
            self._prompt_tokens.labels(name).inc(delta.usage.prompt_tokens)

    def render(self, overview: ClusterOverview, replicas: Mapping[str, str]) -> bytes:
        """The text format, with the pools as they are now. `replicas`: by name, what each exports itself."""
        for gauge in (self._running, self._waiting, self._kv_usage, self._pairs, self._links):
            gauge.clear()  # replicas come and go
        for primary in overview.primaries:
            if primary.status is not None:
                self._running.labels(self._model_name, primary.name).set(primary.status.num_requests_running)
                self._waiting.labels(self._model_name, primary.name).set(primary.status.num_requests_waiting)
                self._kv_usage.labels(self._model_name, primary.name).set(primary.status.kv_cache_usage)
        for drafter in overview.drafters:
            self._pairs.labels(self._model_name, drafter.address).set(drafter.num_sequences)
            self._links.labels(self._model_name, drafter.address).set(len(drafter.linked_primaries))
        merged = CollectorRegistry()
        merged.register(_Merged(self._registry, replicas))
        return generate_latest(merged)


class _Merged:
    """A registry's metrics, and those of replicas under other names, labelled by replica."""

    def __init__(self, own: CollectorRegistry, replicas: Mapping[str, str]) -> None:
        self._own = own
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        own = {metric.name: metric for metric in self._own.collect()}
        yield from own.values()
        others: dict[str, Metric] = {}
        for replica, text in self._replicas.items():
            for metric in text_string_to_metric_families(text):
                if metric.name.removesuffix("_created") in own:
                    continue
                family = others.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
        yield from others.values()


class MeteredTextService:
    """A TextService that counts what passes through it, whichever endpoint it serves."""

    def __init__(self, service: TextService, metrics: ServingMetrics) -> None:
        self._service = service
        self._metrics = metrics

    async def models(self) -> list[ModelCard]:
        return await self._service.models()

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        start = time.perf_counter()
        waiting = True
        async with aclosing(self._service.complete(request)) as deltas:
            async for delta in deltas:
                if waiting and delta.token_ids:
                    self._metrics.observe_first_token(time.perf_counter() - start)
                    waiting = False
                self._metrics.observe(delta)
                yield delta
