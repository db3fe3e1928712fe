"""Primary and drafter as Ray Serve runs them, undecorated (app.py makes deployments of them).

What they add to primary.py and drafter.py is Serve's own: discovery, metadata, reconfiguration without a restart, and
draining, which Serve does for its own requests but not for our streams.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from tandem_serve.config import DrafterPool, PrimaryPool
from tandem_serve.errors import Unavailable
from tandem_serve.serving.drafter import DrafterReplica
from tandem_serve.serving.primary import PrimaryReplica
from tandem_serve.serving.registry import ADDRESS, DRAFTER, discover, drafter_addresses

DRAIN_TIMEOUT_S = 20.0  # for sequences that run when a replica is told to go


class PrimaryDeployment(PrimaryReplica):
    """A primary that links to whichever drafters are up."""

    def __init__(self, pool: PrimaryPool, drafter_application: str | None) -> None:
        super().__init__(pool.model, pool.engine, num_threads=pool.resources.num_threads)
        if drafter_application is not None:
            self._drafters = discover(
                DRAFTER, drafter_application, lambda found: self.set_drafters(drafter_addresses(found))
            )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.set_block_length(int(user_config["block_length"]))

    def check_health(self) -> None:
        """Raises where the engine has died or fails in every step: Serve then starts another replica in its place."""
        if not self._primary.is_healthy:
            raise Unavailable("the primary's engine is broken; see its log")

    async def __del__(self) -> None:
        await self.close(DRAIN_TIMEOUT_S)


class DrafterDeployment(DrafterReplica):
    """A drafter that publishes its address. It listens on the address of its node alone."""

    def __init__(self, pool: DrafterPool) -> None:
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        super().__init__(pool.model, pool.engine, num_threads=pool.resources.num_threads, host=host)

    def record_replica_metadata(self) -> dict[str, str]:
        return {ADDRESS: self.address}

    def check_health(self) -> None:
        """As PrimaryDeployment.check_health."""
        if not self._engine.is_healthy:
            raise Unavailable("the drafter's engine is broken; see its log")

    async def __del__(self) -> None:
        await asyncio.to_thread(self.close)
