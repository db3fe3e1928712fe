"""Raw counters of the two engines, under vLLM's names where vLLM has one and `tandem:` where it does not.

vLLM's names are a primary's, and nobody else's: a sum over all replicas counts every token once.

Ratios are PromQL's business. Draft acceptance rate:
`rate(vllm:spec_decode_num_accepted_tokens_total[5m]) / rate(vllm:spec_decode_num_draft_tokens_total[5m])`.
Mean acceptance length:
`1 + rate(vllm:spec_decode_num_accepted_tokens_total[5m]) / rate(vllm:spec_decode_num_drafts_total[5m])`.
"""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class WithoutDraft(StrEnum):
    """Why a sequence's round was verified without drafts."""

    NOT_REQUESTED = "not_requested"  # block length 0, or the request's last token
    NO_DRAFTER = "no_drafter"  # none is ready that fits
    LATE = "late"  # the deadline passed
    COOLING_DOWN = "cooling_down"  # after a late one
    LOST = "lost"  # the drafter went away while drafting
    REJECTED = "rejected"  # the drafter refused the sequence
    NO_CREDIT = "no_credit"  # flow control holds representations back
    EVICTED = "evicted"  # the representation log ran out of memory, so no drafter can take over
    TOO_LONG = "too_long"  # for the drafter
    EMPTY = "empty"  # the drafter answered with no draft
    NO_REPRESENTATIONS = "no_representations"  # of a cached prefix, which the primary does not run again


class PrimaryMetrics:
    """What a primary engine counts. One registry an engine; pass the process's own to export it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry if registry is not None else CollectorRegistry()
        self.running = Gauge("vllm:num_requests_running", "Requests that hold KV memory.", registry=r)
        self.waiting = Gauge("vllm:num_requests_waiting", "Requests in the queue.", registry=r)
        self.waiting_tokens = Gauge("tandem:num_waiting_tokens", "Prompt tokens in the queue.", registry=r)
        self.kv_cache_usage = Gauge("vllm:kv_cache_usage_perc", "Share of the KV budget reserved, 0..1.", registry=r)
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens computed.", registry=r)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens emitted.", registry=r)
        self.finished = Counter("vllm:request_success", "Requests finished.", ["finished_reason"], registry=r)
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From submission to the first token.", buckets=_SECONDS, registry=r
        )
        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds", "From submission to admission.", buckets=_SECONDS, registry=r
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds", "Between steps that emit.", buckets=_SECONDS, registry=r
        )
        self.time_per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "From a request's first token to its last, a token after the first.",
            buckets=_SECONDS,
            registry=r,
        )
        self.e2e_latency = Histogram(
            "vllm:e2e_request_latency_seconds", "From submission to the last token.", buckets=_SECONDS, registry=r
        )
        self.num_drafts = Counter("vllm:spec_decode_num_drafts", "Rounds verified with drafts.", registry=r)
        self.num_draft_tokens = Counter("vllm:spec_decode_num_draft_tokens", "Drafts verified.", registry=r)
        self.num_accepted_tokens = Counter("vllm:spec_decode_num_accepted_tokens", "Drafts accepted.", registry=r)
        self._accepted_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted, by place in their block.",
            ["position"],
            registry=r,
        )
        self._accepted_at: list[Counter] = []
        self._without_draft = Counter(
            "tandem:rounds_without_draft", "Rounds verified without drafts.", ["cause"], registry=r
        )
        self.without_draft = {cause: self._without_draft.labels(cause.value) for cause in WithoutDraft}
        self.draft_wait = Histogram(
            "tandem:draft_wait_seconds", "From asking for a block to having it.", buckets=_SECONDS, registry=r
        )
        self.draft_idle = Counter(
            "tandem:primary_draft_idle_seconds", "Time in which all that could run waited for drafts.", registry=r
        )
        self.hold_backs = Counter(
            "tandem:hold_backs", "Sequences passed over in a step, their drafts being under way.", registry=r
        )
        self.draft_time = Histogram(
            "tandem:draft_seconds", "A drafter's own time for a block's batch.", buckets=_SECONDS, registry=r
        )
        self.round_trip = Histogram(
            "tandem:draft_round_trip_seconds",
            "What of the wait for a block is not the drafter's own time: wire, encoding, queues.",
            buckets=_SECONDS,
            registry=r,
        )
        self.step_time = Histogram(
            "tandem:step_seconds", "One engine step: forward pass and choice of tokens.", buckets=_SECONDS, registry=r
        )
        self.verify_time = Histogram(
            "tandem:verify_step_seconds",
            "Those steps that verify drafts.",
            buckets=_SECONDS,
            registry=r,
        )
        self.busy = Counter("tandem:engine_busy_seconds", "Time that the engine's thread has worked.", registry=r)
        self.drafters_known = Gauge("tandem:drafters_known", "Drafters that this primary has links to.", registry=r)
        self.drafters_ready = Gauge("tandem:drafters_ready", "Those whose links are ready.", registry=r)
        self.representation_bytes = Counter(
            "tandem:representation_bytes", "Hidden states given to links, before the wire's dtype.", registry=r
        )
        self.representation_log_bytes = Gauge(
            "tandem:representation_log_bytes", "Hidden states kept for re-attachment.", registry=r
        )
        self.near_ties = Counter("tandem:near_ties", "Positions computed again canonically.", registry=r)
        self.failed_steps = Counter("tandem:failed_steps", "Engine steps that raised.", registry=r)

    def count_block(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """One round verified with drafts."""
        self.num_drafts.inc()
        self.num_draft_tokens.inc(num_draft_tokens)
        self.num_accepted_tokens.inc(num_accepted_tokens)
        while len(self._accepted_at) < num_accepted_tokens:
            self._accepted_at.append(self._accepted_per_pos.labels(str(len(self._accepted_at))))
        for counter in self._accepted_at[:num_accepted_tokens]:
            counter.inc()


class DrafterMetrics:
    """What a drafter engine counts."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry if registry is not None else CollectorRegistry()
        self.sequences = Gauge("tandem:drafter_num_sequences", "Sequences held.", registry=r)
        self.kv_cache_usage = Gauge(
            "tandem:drafter_kv_cache_usage_perc", "Share of the KV budget reserved, 0..1.", registry=r
        )
        self.verified_positions = Counter(
            "tandem:drafter_verified_positions", "Positions taken in from primaries.", registry=r
        )
        self.blocks = Counter("tandem:drafter_blocks", "Blocks drafted.", registry=r)
        self.draft_tokens = Counter("tandem:drafter_draft_tokens", "Tokens drafted.", registry=r)
        self.draft_time = Histogram(
            "tandem:drafter_step_seconds", "One step: taking in positions and drafting.", buckets=_SECONDS, registry=r
        )
        self.draft_wait = Histogram(
            "tandem:drafter_wait_seconds",
            "The longest wait of a step's blocks, from the arrival of what asked for them.",
            buckets=_SECONDS,
            registry=r,
        )
        self.busy = Counter("tandem:drafter_busy_seconds", "Time that the engine's thread has worked.", registry=r)
        self.starved = Counter(
            "tandem:drafter_starved_seconds", "Time that it stood still while it held sequences.", registry=r
        )
        ahead = Counter("tandem:drafter_ahead_rounds", "Rounds drafted ahead of.", ["result"], registry=r)
        self.ahead_hits, self.ahead_misses = ahead.labels("hit"), ahead.labels("miss")
        rejections = Counter("tandem:drafter_rejections", "Sequences rejected or evicted.", ["retryable"], registry=r)
        self.rejections = {is_retryable: rejections.labels(str(is_retryable).lower()) for is_retryable in (False, True)}
