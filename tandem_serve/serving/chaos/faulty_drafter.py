"""The drafter pool with a bad network in front of every replica."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from tandem_serve.config import DrafterPool, ObservabilityConfig
from tandem_serve.serving.app import drafter_deployment
from tandem_serve.serving.chaos.network import BadLink, Weather
from tandem_serve.serving.pool_replicas import DrafterDeployment
from tandem_serve.serving.registry import ADDRESS

IMPORT_PATH = "tandem_serve.serving.chaos.faulty_drafter:faulty_drafter_app"


class FaultyDrafter(DrafterDeployment):
    """A drafter that tells primaries the address of a proxy before itself."""

    def __init__(self, pool: DrafterPool, observability: ObservabilityConfig) -> None:
        super().__init__(pool, observability)
        self._link = BadLink(self.address)

    def record_replica_metadata(self) -> dict[str, str]:
        return {ADDRESS: self._link.address}

    async def set_weather(self, weather: Weather, seconds: float, replica_id: str | None = None) -> None:
        self._link.set_weather(weather, seconds)


def faulty_drafter_app(args: Any) -> Application:
    """As app.drafter_app."""
    return drafter_deployment(args, FaultyDrafter)
