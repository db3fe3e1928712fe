"""Each pool as a plain process, without Ray: for tests, benchmarks, and machines that something else places."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from tandem_serve.config import DrafterPool, ObservabilityConfig, PrimaryPool, RouterPool
from tandem_serve.errors import ConfigError
from tandem_serve.rpc.tls import PeerTls
from tandem_serve.serving.exposition import MetricsServer, Target
from tandem_serve.serving.logs import configure_logs
from tandem_serve.serving.tracing import Tracing, start_tracing

DRAIN_TIMEOUT_S = 20.0  # for what runs when a process is told to go

Announce = Callable[[str], None]  # told once, when the process serves


async def run_drafter(
    pool: DrafterPool,
    *,
    host: str,
    port: int,
    metrics_port: int | None,
    observability: ObservabilityConfig,
    announce: Announce,
) -> None:
    """Serves a drafter until SIGINT or SIGTERM. Raises CheckpointError, ConfigError."""
    from tandem_serve.serving.drafter import DrafterReplica

    stopped = _stop_event()
    tracing = _observed(observability, "drafter")
    threads = pool.resources.num_threads
    with _clear_port_errors():
        drafter = DrafterReplica(
            pool.model,
            pool.engine,
            num_threads=threads,
            host=host,
            port=port,
            spans=tracing.sink,
            tls_folder=pool.tls_folder,
        )
        metrics = _export(drafter.registry, host, metrics_port)
    announce(f"drafter listening on {drafter.address}{_where(metrics)}")
    await stopped.wait()
    await asyncio.to_thread(drafter.close)
    await asyncio.to_thread(tracing.close)


async def run_primary(
    pool: PrimaryPool,
    drafter_addresses: Sequence[str],
    *,
    host: str,
    port: int,
    metrics_port: int | None,
    observability: ObservabilityConfig,
    announce: Announce,
) -> None:
    """Serves a primary until SIGINT or SIGTERM. Raises CheckpointError, ConfigError."""
    from tandem_serve.rpc.primary_server import PrimaryServer
    from tandem_serve.serving.primary import PrimaryReplica

    stopped = _stop_event()
    tracing = _observed(observability, "primary")
    threads, folder = pool.resources.num_threads, pool.tls_folder
    primary = PrimaryReplica(pool.model, pool.engine, num_threads=threads, spans=tracing.sink, tls_folder=folder)
    primary.set_drafters(drafter_addresses)
    with _clear_port_errors():
        server = PrimaryServer(primary, host=host, port=port, tls=_tls(pool.tls_folder))
        metrics = _export(primary.registry, host, metrics_port)
    await server.start()
    announce(f"primary listening on {server.address}{_where(metrics)}")
    await stopped.wait()
    await server.stop(DRAIN_TIMEOUT_S)
    await primary.close(0.0)
    await asyncio.to_thread(tracing.close)


async def run_router(
    pool: RouterPool,
    model: str,
    primary_addresses: Sequence[str],
    drafter_addresses: Sequence[str],
    *,
    metrics_port: int | None,
    observability: ObservabilityConfig,
    announce: Announce,
) -> None:
    """Serves HTTP and gRPC over primaries until SIGINT or SIGTERM. Raises CheckpointError, ConfigError.

    Without drafter addresses each primary pairs its sequences with the drafters that it knows itself.
    """
    from tandem_serve.rpc.inference_server import InferenceServer
    from tandem_serve.rpc.primary_client import GrpcPrimary
    from tandem_serve.serving.block_lengths import BlockLengthControl
    from tandem_serve.serving.front_end import build_front_end
    from tandem_serve.serving.http_server import HttpServer
    from tandem_serve.serving.openai_api import create_app
    from tandem_serve.serving.pairing import Pairing
    from tandem_serve.serving.request_ids import EchoRequestId
    from tandem_serve.serving.router import PairingRouter

    stopped = _stop_event()
    tracing = _observed(observability, "router")
    pairing = Pairing(lambda: pool.pairing, lambda: pool.admission.per_primary)
    router = PairingRouter(spans=tracing.sink, pairing=pairing)
    targets: list[Target] = []  # of the other processes' metrics it knows nothing
    front_end = build_front_end(pool, model, router, tracing, lambda: targets)
    tls = _tls(pool.tls_folder)
    clients = {address: GrpcPrimary(address, tls) for address in primary_addresses}
    router.set_primaries(clients)
    router.set_drafters(drafter_addresses)
    router.set_nodes({each: each.rpartition(":")[0] for each in (*primary_addresses, *drafter_addresses)})
    with _clear_port_errors():
        http = HttpServer(EchoRequestId(create_app(front_end)), host=pool.host, port=pool.http_port)
        grpc = InferenceServer(
            front_end.service,
            host=pool.host,
            port=pool.grpc_port,
            check_authorization=front_end.api_keys.check if front_end.api_keys else None,
        )
        metrics = _export(front_end.metrics.registry, pool.host, metrics_port)
    targets += [] if metrics is None else [Target(metrics.address, {"pool": "router"})]
    control = BlockLengthControl(router.primaries, lambda: pool.speculation)
    watching = [asyncio.create_task(control.run()), asyncio.create_task(router.watch())]
    await http.start()
    await grpc.start()
    announce(f"router listening on http://{pool.host}:{http.port} and grpc://{grpc.address}{_where(metrics)}")
    await stopped.wait()
    for task in watching:
        task.cancel()
    await asyncio.gather(http.stop(DRAIN_TIMEOUT_S), grpc.stop(DRAIN_TIMEOUT_S))
    for client in clients.values():
        await client.close()
    await asyncio.to_thread(tracing.close)


def _tls(folder: str | None) -> PeerTls | None:
    return PeerTls(folder) if folder else None


def _stop_event() -> asyncio.Event:
    """Set by SIGINT or SIGTERM. Installed before anything is loaded, so that neither kills a process half-way."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    return stopped


def _observed(config: ObservabilityConfig, pool: str) -> Tracing:
    """Sets up this process's logs and traces. Raises ConfigError."""
    configure_logs(config.logs, pool)
    return start_tracing(config.traces, pool, f"{socket.gethostname()}:{os.getpid()}")


def _export(registry: CollectorRegistry, host: str, port: int | None) -> MetricsServer | None:
    """Serves a registry to Prometheus; None: not at all."""
    return None if port is None else MetricsServer(registry, host=host, port=port)


def _where(metrics: MetricsServer | None) -> str:
    """What to announce of it."""
    return "" if metrics is None else f", metrics on http://{metrics.address}"


@contextmanager
def _clear_port_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.strerror or error}; choose another port or address") from error
