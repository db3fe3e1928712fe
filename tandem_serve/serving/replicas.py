"""The three replica classes as Ray Serve runs them, undecorated (app.py makes deployments of them).

What they add to primary.py, drafter.py and openai_api.py is Serve's own: discovery, metadata, reconfiguration without a
restart, and draining, which Serve does for its own requests but not for our streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve

from tandem_serve.config import DrafterPool, PrimaryPool, RouterPool
from tandem_serve.rpc import inference_server
from tandem_serve.rpc.statuses import set_status
from tandem_serve.serving.drafter import DrafterReplica
from tandem_serve.serving.front_end import build_front_end
from tandem_serve.serving.openai_api import create_app
from tandem_serve.serving.primary import PrimaryReplica
from tandem_serve.serving.registry import REGISTRY, Replicas
from tandem_serve.serving.router import PairingRouter
from tandem_serve.serving.serve_client import ServePrimary

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext
    from ray.serve.handle import DeploymentHandle

    from tandem_serve.rpc._gen.tandem.v1 import inference_pb2

PRIMARY, DRAFTER, ROUTER = "Primary", "Drafter", "Router"  # deployments; each is the only one of its application
DRAIN_TIMEOUT_S = 20.0  # for sequences that run when a replica is told to go
METRICS_TIMEOUT_S = 2.0
ADDRESS = "address"  # key of a drafter's metadata


class PrimaryDeployment(PrimaryReplica):
    """A primary that links to whichever drafters are up."""

    def __init__(self, pool: PrimaryPool, drafter_application: str | None) -> None:
        super().__init__(pool.model, pool.engine, num_threads=pool.resources.num_threads)
        if drafter_application is not None:
            self._drafters = discover(DRAFTER, drafter_application, lambda found: self.set_drafters(_addresses(found)))

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.set_block_length(int(user_config["block_length"]))

    async def __del__(self) -> None:
        await self.close(DRAIN_TIMEOUT_S)


class DrafterDeployment(DrafterReplica):
    """A drafter that publishes its address. It listens on the address of its node alone."""

    def __init__(self, pool: DrafterPool) -> None:
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        super().__init__(pool.model, pool.engine, num_threads=pool.resources.num_threads, host=host)

    def record_replica_metadata(self) -> dict[str, str]:
        return {ADDRESS: self.address}

    async def __del__(self) -> None:
        await asyncio.to_thread(self.close)


class RouterDeployment:
    """The ingress: OpenAI's HTTP API as an ASGI application, InferenceService as methods of the same names."""

    def __init__(self, pool: RouterPool, model: str, primary_application: str, drafter_application: str | None) -> None:
        self._router = PairingRouter()
        self._front_end = build_front_end(pool, model, self._router, self._replica_metrics)
        self._found: dict[str, Replicas] = {}
        self._loop = asyncio.get_running_loop()
        self._handles = {PRIMARY: discover(PRIMARY, primary_application, self._on_loop(self._set_primaries))}
        if drafter_application is not None:
            self._handles[DRAFTER] = discover(DRAFTER, drafter_application, self._on_loop(self._set_drafters))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._front_end)

    async def Generate(
        self, message: inference_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        try:
            async for response in inference_server.generate(self._front_end.service, message):
                yield response
        except Exception as error:
            set_status(grpc_context, error)
            raise

    async def ListModels(
        self, message: inference_pb2.ListModelsRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.ListModelsResponse:
        try:
            return await inference_server.list_models(self._front_end.service)
        except Exception as error:
            set_status(grpc_context, error)
            raise

    async def Check(self, message: Any, grpc_context: RayServegRPCContext) -> Any:
        """grpc.health.v1."""
        try:
            return await inference_server.check(self._front_end.service, message)
        except Exception as error:
            set_status(grpc_context, error)
            raise

    async def _replica_metrics(self) -> dict[str, str]:
        """Of the replicas that answer in time."""
        names = [(pool, replica_id) for pool, found in self._found.items() for replica_id in found]
        calls = [
            asyncio.wait_for(_metrics_of(self._handles[pool], replica_id), METRICS_TIMEOUT_S)
            for pool, replica_id in names
        ]
        texts = await asyncio.gather(*calls, return_exceptions=True)
        return {
            f"{pool}#{replica_id}": text
            for (pool, replica_id), text in zip(names, texts, strict=True)
            if isinstance(text, str)
        }

    def _on_loop(self, apply: Callable[[Replicas], None]) -> Callable[[Replicas], None]:
        """Discovery speaks on a thread of Serve's; pairing belongs to this replica's loop."""

        def watcher(found: Replicas) -> None:
            self._loop.call_soon_threadsafe(apply, found)

        return watcher

    def _set_primaries(self, found: Replicas) -> None:
        self._found[PRIMARY] = found
        self._router.set_primaries(
            {replica_id: ServePrimary(self._handles[PRIMARY], replica_id) for replica_id in found}
        )

    def _set_drafters(self, found: Replicas) -> None:
        self._found[DRAFTER] = found
        self._router.set_drafters(_addresses(found))


def discover(deployment: str, application: str, watcher: Callable[[Replicas], None]) -> DeploymentHandle[Any]:
    """Calls watcher with a deployment's replicas, now and with every change, on any thread, while the handle lives.

    The deployment may not exist yet.
    """
    REGISTRY.watch(application, watcher)
    handle = serve.get_deployment_handle(deployment, application, _check_exists=False)
    handle.info.remote()  # a handle makes its request router, and so learns the replicas, with its first call
    return handle


async def _metrics_of(handle: DeploymentHandle[Any], replica_id: str) -> str:
    text: str = await handle.metrics.remote(replica_id=replica_id)
    return text


def _addresses(found: Replicas) -> list[str]:
    return [metadata[ADDRESS] for metadata in found.values() if ADDRESS in metadata]
