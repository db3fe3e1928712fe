"""The router as Ray Serve runs it, undecorated (app.py makes a deployment of it). Needs no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from tandem_serve.config import RouterPool
from tandem_serve.rpc import inference_server
from tandem_serve.rpc.statuses import set_status
from tandem_serve.serving.front_end import build_front_end
from tandem_serve.serving.openai_api import create_app
from tandem_serve.serving.registry import DRAFTER, PRIMARY, Replicas, discover, drafter_addresses
from tandem_serve.serving.router import PairingRouter
from tandem_serve.serving.serve_client import ServePrimary

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext
    from ray.serve.handle import DeploymentHandle

    from tandem_serve.rpc._gen.tandem.v1 import inference_pb2

METRICS_TIMEOUT_S = 2.0


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
            async with aclosing(inference_server.generate(self._front_end.service, message)) as responses:
                async for response in responses:
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
        self._router.set_drafters(drafter_addresses(found))


async def _metrics_of(handle: DeploymentHandle[Any], replica_id: str) -> str:
    text: str = await handle.metrics.remote(replica_id=replica_id)
    return text
