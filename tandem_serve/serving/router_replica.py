"""The router as Ray Serve runs it, undecorated (app.py makes a deployment of it). Needs no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from tandem_serve.config import (
    AdmissionConfig,
    ObservabilityConfig,
    PairingConfig,
    RouterLimits,
    RouterPool,
    SpeculationConfig,
)
from tandem_serve.rpc import inference_server
from tandem_serve.rpc.authorization import authorization_of
from tandem_serve.rpc.statuses import set_status
from tandem_serve.serving.block_lengths import BlockLengthControl
from tandem_serve.serving.exposition import Target, serve_metrics
from tandem_serve.serving.front_end import build_front_end
from tandem_serve.serving.logs import configure_logs
from tandem_serve.serving.openai_api import create_app
from tandem_serve.serving.pairing import Pairing
from tandem_serve.serving.registry import (
    DRAFTER,
    PRIMARY,
    Replicas,
    discover,
    drafter_addresses,
    metrics_targets,
    node_address,
    nodes,
    replica_name,
)
from tandem_serve.serving.router import PairingRouter
from tandem_serve.serving.serve_client import ServePrimary
from tandem_serve.serving.tracing import start_tracing

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext

    from tandem_serve.rpc._gen.tandem.v1 import inference_pb2


class RouterDeployment:
    """The ingress: OpenAI's HTTP API as an ASGI application, InferenceService as methods of the same names."""

    def __init__(
        self,
        pool: RouterPool,
        model: str,
        primary_application: str,
        drafter_application: str | None,
        observability: ObservabilityConfig,
    ) -> None:
        configure_logs(observability.logs, "router")
        self._tracing = start_tracing(observability.traces, "router", replica_name())
        self._limits, self._admission, self._speculation = pool.limits, pool.admission, pool.speculation
        self._pairing = pool.pairing
        pairing = Pairing(lambda: self._pairing, lambda: self._admission.per_primary)
        self._router = PairingRouter(spans=self._tracing.sink, pairing=pairing)
        self._front_end = build_front_end(
            pool,
            model,
            self._router,
            self._tracing,
            self._metrics_targets,
            limits=lambda: self._limits,
            admission=lambda: self._admission,
            speculation=lambda: self._speculation,
        )
        self._metrics = serve_metrics(self._front_end.metrics.registry, node_address(), observability.metrics.port)
        self._found: dict[str, Replicas] = {}
        self._loop = asyncio.get_running_loop()
        control = BlockLengthControl(self._router.primaries, lambda: self._speculation)
        self._watching = [self._loop.create_task(control.run()), self._loop.create_task(self._router.watch())]
        self._handles = {PRIMARY: discover(PRIMARY, primary_application, self._on_loop(self._set_primaries))}
        if drafter_application is not None:
            self._handles[DRAFTER] = discover(DRAFTER, drafter_application, self._on_loop(self._set_drafters))

    async def __del__(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.to_thread(self._tracing.close)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._front_end)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """What app.user_config says, at the start and with every change of it."""
        self._limits = RouterLimits.model_validate(user_config["limits"])
        self._admission = AdmissionConfig.model_validate(user_config["admission"])
        self._speculation = SpeculationConfig.model_validate(user_config["speculation"])
        self._pairing = PairingConfig.model_validate(user_config["pairing"])
        self._loop.call_soon_threadsafe(self._front_end.capacity_changed)

    async def Generate(
        self, message: inference_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        try:
            name = inference_server.name_call(grpc_context)
            self._check_authorization(grpc_context)
            metadata, peer = grpc_context.invocation_metadata(), grpc_context.peer()
            responses = inference_server.generate(self._front_end.service, message, metadata, name=name, peer=peer)
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except Exception as error:
            set_status(grpc_context, error)
            raise

    async def ListModels(
        self, message: inference_pb2.ListModelsRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.ListModelsResponse:
        try:
            inference_server.name_call(grpc_context)
            self._check_authorization(grpc_context)
            return await inference_server.list_models(self._front_end.service)
        except Exception as error:
            set_status(grpc_context, error)
            raise

    async def Check(self, message: Any, grpc_context: RayServegRPCContext) -> Any:
        """grpc.health.v1; open to all."""
        try:
            return await inference_server.check(self._front_end.service, message)
        except Exception as error:
            set_status(grpc_context, error)
            raise

    def _metrics_targets(self) -> list[Target]:
        """Of both pools, and of this router: other routers it does not know."""
        own = [] if self._metrics is None else [Target(self._metrics.address, {"pool": "router"})]
        return [*own, *(target for pool, found in self._found.items() for target in metrics_targets(pool, found))]

    def _check_authorization(self, grpc_context: RayServegRPCContext) -> None:
        if self._front_end.api_keys is not None:
            self._front_end.api_keys.check(authorization_of(grpc_context.invocation_metadata()))

    def _on_loop(self, apply: Callable[[Replicas], None]) -> Callable[[Replicas], None]:
        """Discovery speaks on a thread of Serve's; pairing belongs to this replica's loop."""

        def watcher(found: Replicas) -> None:
            self._loop.call_soon_threadsafe(apply, found)

        return watcher

    def _set_primaries(self, found: Replicas) -> None:
        self._found[PRIMARY] = found
        self._set_nodes()
        self._router.set_primaries(
            {replica_id: ServePrimary(self._handles[PRIMARY], replica_id) for replica_id in found}
        )
        self._front_end.capacity_changed()

    def _set_drafters(self, found: Replicas) -> None:
        self._found[DRAFTER] = found
        self._set_nodes()
        self._router.set_drafters(drafter_addresses(found))

    def _set_nodes(self) -> None:
        self._router.set_nodes({name: node for found in self._found.values() for name, node in nodes(found).items()})
