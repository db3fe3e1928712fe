"""What a router counts: requests as their clients see them. The engines' own figures are in tandem_serve/metrics.py.

All names begin with `tandem:router_`, so that no sum over replicas counts a token twice. Raw counters and histograms;
ratios are queries.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_serve.errors import InvalidRequest, ModelMismatch, Overloaded, RequestAborted, Unavailable
from tandem_serve.serving.router import PairingRouter

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

_ERRORS: tuple[tuple[type[BaseException], str], ...] = (
    (InvalidRequest, "invalid_request"),
    (ModelMismatch, "model_mismatch"),
    (Overloaded, "overloaded"),
    (Unavailable, "unavailable"),
    (RequestAborted, "aborted"),
    (Exception, "internal"),
    (BaseException, "client_gone"),  # its generator is closed, or its task cancelled
)


class RouterMetrics:
    """The counters of one router. Not process-wide: each instance has its own registry."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.prompt_tokens = Counter("tandem:router_prompt_tokens", "Of finished completions.", registry=r)
        self.generation_tokens = Counter("tandem:router_generation_tokens", "Tokens handed to clients.", registry=r)
        self.finished = Counter(
            "tandem:router_completions",
            "Completions finished, n a request.",
            ["finished_reason"],
            registry=r,
        )
        self._errors = Counter("tandem:router_errors", "Requests that did not finish.", ["kind"], registry=r)
        self.errors = {kind: self._errors.labels(kind) for _, kind in _ERRORS}
        self.first_token = Histogram(
            "tandem:router_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=r,
        )
        self.inter_token_latency = Histogram(
            "tandem:router_inter_token_latency_seconds",
            "Between a completion's steps; a step brings accepted drafts as well.",
            buckets=_TOKEN_BUCKETS_S,
            registry=r,
        )
        self.e2e_latency = Histogram(
            "tandem:router_e2e_request_latency_seconds",
            "From a request to the last token of its last completion.",
            buckets=_LATENCY_BUCKETS_S,
            registry=r,
        )

    def count_error(self, error: BaseException) -> None:
        """One request that has ended by an exception."""
        self.errors[next(name for kind, name in _ERRORS if isinstance(error, kind))].inc()

    def watch(self, router: PairingRouter) -> None:
        """Exports how a router pairs, too."""
        self.registry.register(_Pairing(router))


class _Pairing(Collector):
    """Read when somebody asks, so that pairing itself pays nothing."""

    def __init__(self, router: PairingRouter) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "tandem:router_failovers", "Sequences moved to another primary.", value=self._router.num_failovers
        )
        members = GaugeMetricFamily("tandem:router_members", "Replicas that may get sequences.", labels=["of"])
        sequences = GaugeMetricFamily(
            "tandem:router_num_sequences", "This router's sequences, by replica.", labels=["of", "member"]
        )
        for name, pool in self._router.pools().items():
            members.add_metric([name], len(pool.members))
            for member in pool.members:
                sequences.add_metric([name, member], pool.num_running(member))
        yield members
        yield sequences
