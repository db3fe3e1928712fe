"""Three Ray Serve applications from one cluster file: the only place that says serve.deployment.

One application a pool, because a change of code or of a request router restarts a whole application; what can change
without a restart (replica counts, block length) is in the autoscaling block and in user_config.
"""

# No `from __future__ import annotations`: Serve makes a builder's argument from its annotation, which must be a class.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from tandem_serve.config import ClusterConfig, DrafterPool, ObservabilityConfig, PrimaryPool, RouterPool
from tandem_serve.serving.discovery import REQUEST_ROUTER_PATH
from tandem_serve.serving.pool_replicas import DRAIN_TIMEOUT_S, DrafterDeployment, PrimaryDeployment
from tandem_serve.serving.registry import DRAFTER, PRIMARY, ROUTER
from tandem_serve.serving.router_replica import RouterDeployment

GRPC_SERVICER_FUNCTIONS = [
    "tandem_serve.rpc._gen.tandem.v1.inference_pb2_grpc.add_InferenceServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
LOGGING = {"enable_access_log": False}  # a line a request costs more than the request's share of a step


class _Args(BaseModel):
    observability: ObservabilityConfig = ObservabilityConfig()


class PrimaryArgs(_Args):
    pool: PrimaryPool
    drafter_application: str | None


class DrafterArgs(_Args):
    pool: DrafterPool


class RouterArgs(_Args):
    pool: RouterPool
    model: str  # whose tokenizer the router uses
    primary_application: str
    drafter_application: str | None


DEPLOYMENTS = {PrimaryArgs: PRIMARY, DrafterArgs: DRAFTER, RouterArgs: ROUTER}


def primary_app(args: PrimaryArgs) -> Application:
    engine = args.pool.engine
    deployment = serve.deployment(
        **_options(PRIMARY, args.pool),
        user_config=primary_user_config(args.pool),
        # The engine queues and refuses by itself; Serve only must not stand in the way, nor of calls for the status.
        max_ongoing_requests=engine.max_num_seqs + engine.max_num_waiting + 64,
        request_router_config={"request_router_class": REQUEST_ROUTER_PATH},
    )
    return deployment(PrimaryDeployment).bind(args.pool, args.drafter_application, args.observability)


def drafter_app(args: DrafterArgs) -> Application:
    deployment = serve.deployment(
        **_options(DRAFTER, args.pool), request_router_config={"request_router_class": REQUEST_ROUTER_PATH}
    )
    return deployment(DrafterDeployment).bind(args.pool, args.observability)


def router_app(args: RouterArgs) -> Application:
    limit = args.pool.max_ongoing_requests
    deployment = serve.deployment(
        **_options(ROUTER, args.pool),
        max_ongoing_requests=limit,
        max_queued_requests=limit,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
    )
    ingress = serve.ingress()(RouterDeployment)
    return deployment(ingress).bind(
        args.pool, args.model, args.primary_application, args.drafter_application, args.observability
    )


def primary_user_config(pool: PrimaryPool) -> dict[str, Any]:
    """What a running primary can change: see PrimaryDeployment.reconfigure."""
    return {"block_length": pool.engine.block_length}


@dataclass(frozen=True, slots=True)
class ClusterApplication:
    """One of the three applications, before it is built."""

    name: str
    builder: Callable[[Any], Application]
    args: PrimaryArgs | DrafterArgs | RouterArgs
    route_prefix: str | None = None

    def build(self) -> Application:
        return self.builder(self.args)

    def config(self) -> dict[str, Any]:
        """Its entry in a Serve config. What may be edited there without a restart is spelt out."""
        overrides: dict[str, Any] = {"name": DEPLOYMENTS[type(self.args)], **_scaling(self.args.pool.num_replicas)}
        if isinstance(self.args, PrimaryArgs):
            overrides["user_config"] = primary_user_config(self.args.pool)
        return {
            "name": self.name,
            "route_prefix": self.route_prefix,
            "import_path": f"{self.builder.__module__}:{self.builder.__name__}",
            "args": self.args.model_dump(mode="json"),
            "logging_config": dict(LOGGING),  # one of its own: as YAML, a shared one would be an anchor and aliases
            "deployments": [overrides],
        }


def applications(config: ClusterConfig) -> list[ClusterApplication]:
    """A cluster's applications in the order to start them; the router, alone reachable from outside, comes last."""
    primary, router = f"{config.name}-primary", config.name
    drafter = f"{config.name}-drafter" if config.drafter.num_replicas else None
    observability = config.observability
    primary_args = PrimaryArgs(pool=config.primary, drafter_application=drafter, observability=observability)
    found = [ClusterApplication(primary, primary_app, primary_args)]
    if drafter is not None:
        drafter_args = DrafterArgs(pool=config.drafter, observability=observability)
        found.append(ClusterApplication(drafter, drafter_app, drafter_args))
    router_args = RouterArgs(
        pool=config.router,
        model=config.primary.model,
        primary_application=primary,
        drafter_application=drafter,
        observability=observability,
    )
    return [*found, ClusterApplication(router, router_app, router_args, route_prefix="/")]


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """The cluster as a Serve config: what `serve deploy` and a RayService's serveConfigV2 take."""
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(config.router),
        "grpc_options": grpc_options(config.router),
        "applications": [application.config() for application in applications(config)],
    }


def http_options(pool: RouterPool) -> dict[str, Any]:
    return {"host": pool.host, "port": pool.http_port, "request_timeout_s": pool.request_timeout_s}


def grpc_options(pool: RouterPool) -> dict[str, Any]:
    return {
        "port": pool.grpc_port,
        "grpc_servicer_functions": GRPC_SERVICER_FUNCTIONS,
        "request_timeout_s": pool.request_timeout_s,
        "enable_reflection": pool.api_keys_file is None,  # Serve's own answers without a key
    }


def _options(name: str, pool: PrimaryPool | DrafterPool | RouterPool) -> dict[str, Any]:
    """What all three deployments have in common."""
    resources = pool.resources
    actor: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.label_selector:
        actor["label_selector"] = resources.label_selector
    return {
        "name": name,
        **_scaling(pool.num_replicas),
        "ray_actor_options": actor,
        "health_check_period_s": 2,  # a killed replica is out of the view within a second, replaced after about two
        "health_check_timeout_s": 20,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S + 5,
        "max_constructor_retry_count": 3,
        "logging_config": LOGGING,
    }


def _scaling(num_replicas: int) -> dict[str, Any]:
    """A fixed count is an autoscaling block too: adding or dropping the block later would restart the replicas."""
    return {"autoscaling_config": {"min_replicas": num_replicas, "max_replicas": num_replicas}}
