"""A whole cluster on this machine: local Ray, three applications, and nothing left when it goes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tandem_serve.config import (
    ClusterConfig,
    DrafterPool,
    PrimaryEngineConfig,
    PrimaryPool,
    VllmEngineConfig,
    largest,
    load_cluster_config,
    resolve_model,
)
from tandem_serve.errors import ConfigError, Unavailable
from tandem_serve.models.pairs import DEMO, pair_folder

if TYPE_CHECKING:
    from tandem_serve.serving.app import ClusterApplication
    from tandem_serve.serving.plan import Change

HEALTHY_TIMEOUT_S = 300.0  # vLLM takes a minute on a cold disk
_OBJECT_STORE_BYTES = 128 << 20  # Ray's is hardly used: tokens and representations travel elsewhere

# Before ray is imported, and only where the user has not set them.
SERVE_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # else 15, where any other work on the machine starves the replicas
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(8 << 20),  # else 2 GiB; rpc/inference_server.py has the same without Ray
    # Steps go from replica to replica over gRPC, not through the object store: half the router's CPU an event. Clients
    # stay behind Serve's proxy, though: replicas that took HTTP directly would do so on every address of the machine.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # the proxy as well: a refusal takes 14 ms instead of 18 on a busy machine
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # A version of which one replica has started is sound: should more die during its roll-out, they are replaced. Else
    # Serve stops there, and a pool that loses three replicas of the new version meanwhile stays as small as it is.
    "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES": "0",
}
_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on any system: 127.0.0.1 stays what it is

_LOCAL_MARK = "tandem_serve_local"  # a resource of the Ray that local_cluster starts

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a cluster listens."""

    http: str  # http://host:port
    grpc: str  # host:port
    ray: str  # host:port, for `tandem-serve apply --address`


def load_cluster(path: Path) -> ClusterConfig:
    """Reads a cluster file, with models and certificates as folders that any process on this machine finds.

    A model may be a hub id and stays one.

    Raises:
        ConfigError: naming the file, the field and what is wrong with it.
    """
    config = load_cluster_config(path)

    def beside(name: str | None) -> str | None:
        return name and str((path.parent / name).absolute())

    def absolute(role: str, pool: PrimaryPool | DrafterPool) -> dict[str, str | None]:
        is_demo = pool.model == DEMO
        model = str(pair_folder(DEMO) / role) if is_demo else resolve_model(pool.model, path.parent)
        return {"model": model, "tls_folder": beside(pool.tls_folder)}

    drafter = config.drafter.model_copy(update=absolute("drafter", config.drafter))
    engine = {"engine": _with_taps(config, drafter.model)}
    return config.model_copy(
        update={
            "primary": config.primary.model_copy(update=absolute("primary", config.primary) | engine),
            "drafter": drafter,
            "router": config.router.model_copy(update={"api_keys_file": beside(config.router.api_keys_file)}),
        }
    )


def _with_taps(config: ClusterConfig, drafter: str) -> PrimaryEngineConfig | VllmEngineConfig:
    """The primary's engine; vLLM must know from the start which layers the drafter pool reads."""
    engine = config.primary.engine
    if not isinstance(engine, VllmEngineConfig) or engine.taps is not None or not config.drafter.num_replicas:
        return engine
    from tandem_serve.models.checkpoint import drafter_info

    if not Path(drafter).is_dir():
        raise ConfigError(f"primary.engine.taps must be given: the drafter {drafter!r} is not here to be asked")
    taps = drafter_info(drafter, max_block_length=config.drafter.engine.max_block_length).taps
    return engine.model_copy(update={"taps": taps})


def prepare_environment(*, is_one_machine: bool = False) -> None:
    """Before ray is imported. What the user has set stays.

    is_one_machine: all nodes listen on the loopback address alone. Unless it is told, Ray takes that for the machine's
    outer address, where nobody answers.
    """
    for name, value in (SERVE_ENVIRONMENT | (_ONE_MACHINE if is_one_machine else {})).items():
        os.environ.setdefault(name, value)


@contextmanager
def local_cluster(config: ClusterConfig, progress: Progress) -> Iterator[Endpoints]:
    """Starts the cluster and yields once it answers; drains and ends it, and every process of it, on the way out.

    Node labels that pools ask for are ignored: here there is one node.

    Raises:
        ConfigError: models that do not fit together, a port that is taken, replicas that do not come up.
        CheckpointError: a model that cannot be loaded.
    """
    config = with_free_ports(_unlabelled(config))
    check_models(config)
    prepare_environment(is_one_machine=True)
    progress("starting Ray")
    import ray

    from tandem_serve.serving import app, deploying

    _start_ray(_num_cpus(config))
    endpoints = Endpoints(
        http=f"http://{config.router.host}:{config.router.http_port}",
        grpc=f"{config.router.host}:{config.router.grpc_port}",
        ray=ray.get_runtime_context().gcs_address,
    )
    try:
        deploying.start_serve(config)
        try:
            progress("loading the models")
            deploying.deploy(app.serve_config(config), app.application_names(config.name))
            progress("waiting for the first primary")
            _wait_until_healthy(endpoints.http)
            yield endpoints
        finally:
            progress("draining")
            _delete(app.applications(config))
    finally:
        ray.shutdown()  # takes Serve's controller and proxy along


def apply_cluster(
    config: ClusterConfig, address: str, *, dry_run: bool, show: Callable[[list[Change]], None]
) -> list[Change]:
    """Brings what runs on the Ray at `address` to what `config` says. `show` is told the plan before anything is done.

    Starts the cluster where it does not run yet.

    Raises:
        Unavailable: no Ray there.
        ConfigError: models that do not fit together, a change that no running cluster can take, replicas that do not
            come up.
    """
    check_models(config)
    prepare_environment(is_one_machine=address.startswith("127."))  # as what `up` starts
    if (Path.home() / ".ray" / "auth_token").exists():  # what `up` starts asks for it; Ray sends it only if told to
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    from tandem_serve.serving import app, deploying
    from tandem_serve.serving.plan import Effect, plan

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise Unavailable(f"no Ray at {address}: {error}") from error
    try:
        if _LOCAL_MARK in ray.cluster_resources():  # type: ignore[no-untyped-call]
            config = _unlabelled(config)
        names = app.application_names(config.name)
        deployed, wanted = deploying.deployed_config(names), app.serve_config(config)
        changes = plan(deployed, wanted)
        show(changes)
        if stuck := [change.field for change in changes if change.effect is Effect.NEW_CLUSTER]:
            raise ConfigError(f"no running cluster can change {', '.join(stuck)}: end it and start it anew")
        if changes and not dry_run:
            if not deployed["applications"]:
                deploying.start_serve(config, proxy_location="EveryNode")
            deploying.deploy(wanted, names)
        return changes
    finally:
        ray.shutdown()


def _start_ray(num_cpus: int) -> None:
    """A local Ray. It listens on the loopback address; only Serve's gRPC ports are open on every address: the ingress,
    and from replica to replica, where Ray's token keeps strangers out (unless RAY_AUTH_MODE is set to disabled).
    """
    import ray

    before = signal.getsignal(signal.SIGTERM)
    for name in ("ray._private.authentication", "ray.serve"):  # they tell of every step
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(
        address="local",  # never somebody else's cluster
        num_cpus=num_cpus,
        resources={_LOCAL_MARK: 1},
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has put in its own, which leaves without draining


def check_models(config: ClusterConfig) -> None:
    """Finds out before anything is started whether the models load and belong together. Reads no weights in full."""
    from tandem_serve.models.checkpoint import drafter_info, primary_info
    from tandem_serve.types import mismatches

    primary = primary_info(config.primary.model)
    if config.drafter.num_replicas:
        drafter = drafter_info(config.drafter.model, max_block_length=config.drafter.engine.max_block_length)
        if found := mismatches(primary, drafter):
            raise ConfigError(f"drafter {config.drafter.model} was not made for this primary: {'; '.join(found)}")


def with_free_ports(config: ClusterConfig) -> ClusterConfig:
    """The same cluster with free ports for those given as 0. Raises ConfigError where a port is taken."""
    router = config.router
    ports = {
        "http_port": _free_port("router.http_port", router.host, router.http_port),
        "grpc_port": _free_port("router.grpc_port", router.host, router.grpc_port),
    }
    return config.model_copy(update={"router": router.model_copy(update=ports)})


def _unlabelled(config: ClusterConfig) -> ClusterConfig:
    """Without what tells nodes apart: for where there is one."""
    update = {}
    for name in ("primary", "drafter", "router"):
        pool = getattr(config, name)
        resources = pool.resources.model_copy(update={"label_selector": {}, "accelerator_type": None})
        update[name] = pool.model_copy(update={"resources": resources})
    return config.model_copy(update=update)


def _free_port(field: str, host: str, port: int) -> int:
    """The port itself, or any free one for 0. Serve would report a taken one minutes later, from another process."""
    try:
        with socket.create_server((host, port)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
        raise ConfigError(f"{field}: port {port} on {host} {reason}") from error


def _num_cpus(config: ClusterConfig) -> int:
    """Ray only counts CPUs: on a small machine replicas share them, so it is told of as many as they may ask for.

    Twice as many as the pools can grow to, for a restart that starts new replicas first, and for `tandem-serve apply`.
    """
    pools = (config.primary, config.drafter, config.router)
    total = sum(pool.resources.num_cpus * largest(pool) for pool in pools)
    return max(os.cpu_count() or 1, int(2 * total) + 2)


def _delete(applications: Sequence[ClusterApplication]) -> None:
    """The router goes first: it takes nothing new and ends what runs, for which it needs the pools."""
    from ray import serve

    for application in reversed(applications):
        serve.delete(application.name)


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + HEALTHY_TIMEOUT_S
    reason = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            reason = str(error)
        time.sleep(0.1)
    raise Unavailable(f"{url}/health did not answer within {HEALTHY_TIMEOUT_S:.0f} s: {reason}")
