"""Three Ray Serve applications from one cluster file: the only place that says serve.deployment.

One application a pool, because Serve restarts an application as a whole wherever its code, its request router or its
arguments change. So arguments hold what needs a restart and nothing else (`_restart_part`); what a running pool takes
(replica counts, bounds, block length, limits) is in its deployment's entry: autoscaling block and user_config.
"""

# No `from __future__ import annotations`: Serve makes a builder's argument from its annotation, which must be a class.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from tandem_serve.config import (
    Autoscaling,
    ClusterConfig,
    DrafterPool,
    ObservabilityConfig,
    Pool,
    PrimaryPool,
    RouterAutoscaling,
    RouterPool,
)
from tandem_serve.serving.autoscaling import POLICY_PATH
from tandem_serve.serving.discovery import REQUEST_ROUTER_PATH
from tandem_serve.serving.pool_replicas import DRAIN_TIMEOUT_S, DrafterDeployment, PrimaryDeployment
from tandem_serve.serving.registry import DRAFTER, PRIMARY, ROUTER
from tandem_serve.serving.router_replica import RouterDeployment

GRPC_SERVICER_FUNCTIONS = [
    "tandem_serve.rpc._gen.tandem.v1.inference_pb2_grpc.add_InferenceServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
P = TypeVar("P", bound=Pool)
AnyPool = PrimaryPool | DrafterPool | RouterPool

PREFIX_TOKENS = 64  # of a prompt that primaries which cache prefixes are told apart by
ROUTER_PARTS = ("limits", "admission", "speculation", "pairing")  # that a running router takes
METRICS = {"metrics_interval_s": 1, "look_back_period_s": 3}  # of what replicas report for autoscaling
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


# Serve hands a builder the arguments of its entry as a plain dict: it does not see through postponed annotations.


def primary_app(args: Any) -> Application:
    args = PrimaryArgs.model_validate(args)
    engine = args.pool.engine
    deployment = serve.deployment(
        **_options(PRIMARY, args.pool),
        # The engine queues and refuses by itself; Serve only must not stand in the way, nor of calls for the status.
        max_ongoing_requests=engine.max_num_seqs + engine.max_num_waiting + 64,
        request_router_config={"request_router_class": REQUEST_ROUTER_PATH},
    )
    return deployment(PrimaryDeployment).bind(args.pool, args.drafter_application, args.observability)


def drafter_app(args: Any) -> Application:
    return drafter_deployment(args, DrafterDeployment)


def drafter_deployment(args: Any, kind: type[DrafterDeployment]) -> Application:
    """A drafter pool of this kind of replicas."""
    args = DrafterArgs.model_validate(args)
    deployment = serve.deployment(
        **_options(DRAFTER, args.pool), request_router_config={"request_router_class": REQUEST_ROUTER_PATH}
    )
    return deployment(kind).bind(args.pool, args.observability)


def router_app(args: Any) -> Application:
    args = RouterArgs.model_validate(args)
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


def user_config(pool: AnyPool) -> dict[str, Any]:
    """What a running replica takes: see `reconfigure` in pool_replicas.py and router_replica.py."""
    if isinstance(pool, PrimaryPool):
        return {"block_length": pool.engine.block_length, "autoscaling": _dumped(pool.autoscaling)}
    if isinstance(pool, RouterPool):
        return {part: getattr(pool, part).model_dump(mode="json") for part in ROUTER_PARTS}
    return {"autoscaling": _dumped(pool.autoscaling)}


def _dumped(targets: Autoscaling | None) -> dict[str, Any] | None:
    return None if targets is None else targets.model_dump(mode="json")


def _restart_part(pool: P) -> P:
    """The pool with everything that a running one takes at its default: what is left is what needs a restart."""
    update: dict[str, Any] = {"num_replicas": 1, "autoscaling": None, "max_surge_percent": 0}
    if isinstance(pool, PrimaryPool):
        default = type(pool.engine).model_fields["block_length"].default
        update["engine"] = pool.engine.model_copy(update={"block_length": default})
    if isinstance(pool, RouterPool):
        update |= {part: RouterPool.model_fields[part].default for part in ROUTER_PARTS}
        # Serve's own, for the whole cluster (`serve_config`); no replica looks at them.
        update |= {name: RouterPool.model_fields[name].default for name in ("host", "http_port", "grpc_port")}
    return pool.model_copy(update=update)


@dataclass(frozen=True, slots=True)
class ClusterApplication:
    """One of the three applications, before it is built."""

    name: str
    builder: Callable[[Any], Application]
    args: PrimaryArgs | DrafterArgs | RouterArgs
    route_prefix: str | None = None

    def config(self) -> dict[str, Any]:
        """Its entry in a Serve config."""
        pool = self.args.pool
        args = self.args.model_copy(update={"pool": _restart_part(pool)})
        return {
            "name": self.name,
            "route_prefix": self.route_prefix,
            "import_path": f"{self.builder.__module__}:{self.builder.__name__}",
            "args": args.model_dump(mode="json"),
            "logging_config": dict(LOGGING),  # one of its own: as YAML, a shared one would be an anchor and aliases
            "deployments": [
                {
                    "name": DEPLOYMENTS[type(self.args)],
                    "max_surge_percent": pool.max_surge_percent,
                    "autoscaling_config": _scaling(pool),
                    "user_config": user_config(pool),
                }
            ],
        }


def application_names(cluster: str) -> tuple[str, str, str]:
    """Of a cluster's primary, drafter and router pool."""
    return f"{cluster}-primary", f"{cluster}-drafter", cluster


def applications(config: ClusterConfig) -> list[ClusterApplication]:
    """A cluster's applications in the order to start them; the router, alone reachable from outside, comes last."""
    primary, drafters, router = application_names(config.name)
    drafter = drafters if config.drafter.num_replicas else None
    observability = config.observability
    primary_args = PrimaryArgs(pool=config.primary, drafter_application=drafter, observability=observability)
    found = [ClusterApplication(primary, primary_app, primary_args)]
    if drafter is not None:
        drafter_args = DrafterArgs(pool=config.drafter, observability=observability)
        found.append(ClusterApplication(drafter, drafter_app, drafter_args))
    router_args = RouterArgs(
        pool=_told_of_primaries(config),
        model=config.primary.model,
        primary_application=primary,
        drafter_application=drafter,
        observability=observability,
    )
    return [*found, ClusterApplication(router, router_app, router_args, route_prefix="/")]


def _told_of_primaries(config: ClusterConfig) -> RouterPool:
    """The router pool, told how many sequences of one primary are each router's, and whether it caches prefixes."""
    router, share = config.router, config.router.admission.max_running_per_primary
    if share is None:
        share = max(config.primary.engine.max_num_seqs // router.num_replicas, 1)
    prefix_tokens = router.pairing.prefix_tokens
    if prefix_tokens is None:
        prefix_tokens = PREFIX_TOKENS if config.primary.engine.engine == "vllm" else 0
    return router.model_copy(
        update={
            "admission": router.admission.model_copy(update={"max_running_per_primary": share}),
            "pairing": router.pairing.model_copy(update={"prefix_tokens": prefix_tokens}),
        }
    )


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


def _options(name: str, pool: AnyPool) -> dict[str, Any]:
    """What all three deployments have in common, but for what is in their entries."""
    resources = pool.resources
    actor: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.memory_bytes:
        actor["memory"] = resources.memory_bytes
    if resources.accelerator_type:
        actor["accelerator_type"] = resources.accelerator_type
    if resources.label_selector:
        actor["label_selector"] = resources.label_selector
    return {
        "name": name,
        "autoscaling_config": _scaling(pool),
        "ray_actor_options": actor,
        "health_check_period_s": 2,  # a killed replica is out of the view within a second, replaced after about two
        "health_check_timeout_s": 20,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S + 5,
        "logging_config": LOGGING,
    }


def _scaling(pool: AnyPool) -> dict[str, Any]:
    """A fixed count is an autoscaling block too: adding or dropping the block later would restart the replicas."""
    bounds: Autoscaling | None = pool.autoscaling
    scaling: dict[str, Any] = {"min_replicas": pool.num_replicas, "max_replicas": pool.num_replicas}
    if bounds is not None:
        # No initial_replicas: Serve would go back to it with every change that is applied.
        shared = ("min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s")
        scaling = {name: getattr(bounds, name) for name in shared}
    if isinstance(bounds, RouterAutoscaling):  # Serve's own policy: a router's work is requests that Serve sees
        return {**scaling, "target_ongoing_requests": bounds.target_ongoing_requests}
    if isinstance(pool, RouterPool):
        return scaling
    return {**scaling, **METRICS, "policy": {"policy_function": POLICY_PATH}}
