"""The primary replica: an engine and its links to drafters. Serve's deployment and the plain process share it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from prometheus_client import CollectorRegistry

from tandem_serve.config import PrimaryEngineConfig, VllmEngineConfig
from tandem_serve.decoding.directed_policy import DirectedPolicy
from tandem_serve.decoding.goodput import MeasuredBlockLength
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.metrics import PrimaryMetrics
from tandem_serve.rpc.tls import PeerTls
from tandem_serve.serving.autoscaling import PrimarySignals, Totals
from tandem_serve.tracing import SpanSink, discard
from tandem_serve.types import (
    BlockLengths,
    DraftingCosts,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    PrimaryStatus,
)


def _block_policy(config: PrimaryEngineConfig | VllmEngineConfig) -> DirectedPolicy | MeasuredBlockLength:
    if isinstance(config, VllmEngineConfig):
        return MeasuredBlockLength(config.block_length, config.longest_block_length, adapts=config.adapts)
    return DirectedPolicy(RequestedPolicy(config.block_length, config.policy))


class PrimaryReplica:
    """Runs from construction to `close`. The methods that Serve calls by handle are interfaces.Primary's.

    `replica_id` is for discovery.DiscoveryRouter alone, which has acted on it by the time a call arrives.
    """

    def __init__(
        self,
        model: str,
        config: PrimaryEngineConfig | VllmEngineConfig,
        *,
        num_threads: int = 1,
        spans: SpanSink = discard,
        tls_folder: str | None = None,
    ) -> None:
        """Loads the model and starts the engine. Raises CheckpointError, ConfigError (certificates)."""
        import torch  # here: who only describes a cluster (app.py) has no use for it

        from tandem_serve.rpc.drafting_client import GrpcLinkFactory
        from tandem_serve.serving.engines import build_primary

        tls = PeerTls(tls_folder) if tls_folder else None
        torch.set_num_threads(num_threads)
        self._policy = _block_policy(config)
        self.registry = CollectorRegistry()
        self._max_num_seqs = config.max_num_seqs
        self._steps = Totals()
        self._primary = build_primary(
            model,
            config,
            link_factory=GrpcLinkFactory(tls=tls),
            policy=self._policy,
            metrics=PrimaryMetrics(self.registry),
            spans=spans,
        )
        self._primary.start()

    async def info(self, replica_id: str | None = None) -> PrimaryInfo:
        return await self._primary.info()

    async def status(self, replica_id: str | None = None) -> PrimaryStatus:
        return await self._primary.status()

    async def direct(self, lengths: BlockLengths | None, replica_id: str | None = None) -> DraftingCosts | None:
        """See interfaces.Directable."""
        if not isinstance(self._policy, DirectedPolicy):
            return None
        return self._policy.direct(lengths)

    async def generate(
        self, request: GenerationRequest, replica_id: str | None = None
    ) -> AsyncGenerator[GenerationStep, None]:
        async with aclosing(self._primary.generate(request)) as steps:
            async for step in steps:
                yield step

    def signals(self) -> PrimarySignals:
        """What decides how many primaries there should be. Means are of what happened since the last call."""

        def figure(name: str) -> float:
            return self.registry.get_sample_value(name) or 0.0

        step_s, num_steps = self._steps.since(figure("tandem:step_seconds_sum"), figure("tandem:step_seconds_count"))
        return PrimarySignals(
            batch_occupancy=figure("vllm:num_requests_running") / self._max_num_seqs,
            kv_cache_usage=figure("vllm:kv_cache_usage_perc"),
            num_waiting_tokens=int(figure("tandem:num_waiting_tokens")),
            mean_step_s=step_s / num_steps if num_steps else None,
        )

    def set_drafters(self, addresses: Iterable[str]) -> None:
        """The drafters to link to. Any thread."""
        self._primary.set_drafters(addresses)

    def set_block_length(self, default: int) -> None:
        """Drafts a round where a request does not say."""
        self._policy.set_default(default)

    async def close(self, drain_timeout_s: float) -> None:
        """Takes nothing new, gives what runs the time to finish, aborts the rest."""
        await self._primary.close(drain_timeout_s)
