"""Primary and drafter as Ray Serve runs them, undecorated (app.py makes deployments of them).

What they add to primary.py and drafter.py is Serve's own: discovery, metadata, reconfiguration without a restart, and
draining, which Serve does for its own requests but not for our streams.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tandem_serve.config import DrafterAutoscaling, DrafterPool, ObservabilityConfig, PrimaryAutoscaling, PrimaryPool
from tandem_serve.errors import Unavailable
from tandem_serve.serving.autoscaling import LOAD, drafter_load, primary_load
from tandem_serve.serving.drafter import DrafterReplica
from tandem_serve.serving.exposition import serve_metrics
from tandem_serve.serving.logs import configure_logs
from tandem_serve.serving.primary import PrimaryReplica
from tandem_serve.serving.registry import (
    ADDRESS,
    DRAFTER,
    discover,
    drafter_addresses,
    metrics_metadata,
    node_address,
    replica_name,
)
from tandem_serve.serving.tracing import start_tracing

DRAIN_TIMEOUT_S = 20.0  # for sequences that run when a replica is told to go


class PrimaryDeployment(PrimaryReplica):
    """A primary that links to whichever drafters are up."""

    def __init__(self, pool: PrimaryPool, drafter_application: str | None, observability: ObservabilityConfig) -> None:
        self._targets: PrimaryAutoscaling | None = None
        configure_logs(observability.logs, "primary")
        self._tracing = start_tracing(observability.traces, "primary", replica_name())
        super().__init__(
            pool.model,
            pool.engine,
            num_threads=pool.resources.num_threads,
            spans=self._tracing.sink,
            tls_folder=pool.tls_folder,
        )
        self._metrics = serve_metrics(self.registry, node_address(), observability.metrics.port)
        if drafter_application is not None:
            self._drafters = discover(
                DRAFTER, drafter_application, lambda found: self.set_drafters(drafter_addresses(found))
            )

    def record_replica_metadata(self) -> dict[str, str]:
        return metrics_metadata(self._metrics)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """What app.user_config says, at the start and with every change of it."""
        self.set_block_length(int(user_config["block_length"]))
        targets = user_config["autoscaling"]
        self._targets = None if targets is None else PrimaryAutoscaling.model_validate(targets)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For autoscaling.LoadPolicy. A pool of a fixed size has nothing to say."""
        return {} if self._targets is None else {LOAD: primary_load(self.signals(), self._targets)}

    def check_health(self) -> None:
        """Raises where the engine has died or fails in every step: Serve then starts another replica in its place."""
        if not self._primary.is_healthy:
            raise Unavailable("the primary's engine is broken; see its log")

    async def __del__(self) -> None:
        await self.close(DRAIN_TIMEOUT_S)
        await asyncio.to_thread(self._tracing.close)


class DrafterDeployment(DrafterReplica):
    """A drafter that publishes its address. It listens on the address of its node alone."""

    def __init__(self, pool: DrafterPool, observability: ObservabilityConfig) -> None:
        self._targets: DrafterAutoscaling | None = None
        configure_logs(observability.logs, "drafter")
        self._tracing = start_tracing(observability.traces, "drafter", replica_name())
        host = node_address()
        super().__init__(
            pool.model,
            pool.engine,
            num_threads=pool.resources.num_threads,
            host=host,
            spans=self._tracing.sink,
            tls_folder=pool.tls_folder,
        )
        self._metrics = serve_metrics(self.registry, host, observability.metrics.port)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """As PrimaryDeployment.reconfigure."""
        targets = user_config["autoscaling"]
        self._targets = None if targets is None else DrafterAutoscaling.model_validate(targets)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """As PrimaryDeployment.record_autoscaling_stats."""
        return {} if self._targets is None else {LOAD: drafter_load(self.signals(), self._targets)}

    def record_replica_metadata(self) -> dict[str, str]:
        return {ADDRESS: self.address, **metrics_metadata(self._metrics)}

    def check_health(self) -> None:
        """As PrimaryDeployment.check_health."""
        if not self._engine.is_healthy:
            raise Unavailable("the drafter's engine is broken; see its log")

    async def __del__(self) -> None:
        await asyncio.to_thread(self.close)
        await asyncio.to_thread(self._tracing.close)
