"""Each pool as a plain process, without Ray: for tests, benchmarks, and machines that something else places."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from tandem_serve.config import DrafterPool, PrimaryPool, RouterPool
from tandem_serve.errors import ConfigError

DRAIN_TIMEOUT_S = 20.0  # for what runs when a process is told to go

Announce = Callable[[str], None]  # told once, when the process serves


async def run_drafter(pool: DrafterPool, *, host: str, port: int, metrics_port: int | None, announce: Announce) -> None:
    """Serves a drafter until SIGINT or SIGTERM. Raises CheckpointError, ConfigError."""
    from tandem_serve.serving.drafter import DrafterReplica

    stopped = _stop_event()
    with _clear_port_errors():
        drafter = DrafterReplica(pool.model, pool.engine, num_threads=pool.resources.num_threads, host=host, port=port)
        metrics = _export(drafter.registry, host, metrics_port)
    announce(f"drafter listening on {drafter.address}{metrics}")
    await stopped.wait()
    await asyncio.to_thread(drafter.close)


async def run_primary(
    pool: PrimaryPool,
    drafter_addresses: Sequence[str],
    *,
    host: str,
    port: int,
    metrics_port: int | None,
    announce: Announce,
) -> None:
    """Serves a primary until SIGINT or SIGTERM. Raises CheckpointError, ConfigError."""
    from tandem_serve.rpc.primary_server import PrimaryServer
    from tandem_serve.serving.primary import PrimaryReplica

    stopped = _stop_event()
    primary = PrimaryReplica(pool.model, pool.engine, num_threads=pool.resources.num_threads)
    primary.set_drafters(drafter_addresses)
    with _clear_port_errors():
        server = PrimaryServer(primary, host=host, port=port)
        metrics = _export(primary.registry, host, metrics_port)
    await server.start()
    announce(f"primary listening on {server.address}{metrics}")
    await stopped.wait()
    await server.stop(DRAIN_TIMEOUT_S)
    await primary.close(0.0)


async def run_router(
    pool: RouterPool,
    model: str,
    primary_addresses: Sequence[str],
    drafter_addresses: Sequence[str],
    *,
    announce: Announce,
) -> None:
    """Serves HTTP and gRPC over primaries until SIGINT or SIGTERM. Raises CheckpointError, ConfigError.

    Without drafter addresses each primary pairs its sequences with the drafters that it knows itself.
    """
    from tandem_serve.rpc.inference_server import InferenceServer
    from tandem_serve.rpc.primary_client import GrpcPrimary
    from tandem_serve.serving.front_end import build_front_end
    from tandem_serve.serving.http_server import HttpServer
    from tandem_serve.serving.openai_api import create_app
    from tandem_serve.serving.router import PairingRouter

    stopped = _stop_event()
    router = PairingRouter()
    front_end = build_front_end(pool, model, router)
    clients = {address: GrpcPrimary(address) for address in primary_addresses}
    router.set_primaries(clients)
    router.set_drafters(drafter_addresses)
    with _clear_port_errors():
        http = HttpServer(create_app(front_end), host=pool.host, port=pool.http_port)
        grpc = InferenceServer(front_end.service, host=pool.host, port=pool.grpc_port)
    await http.start()
    await grpc.start()
    announce(f"router listening on http://{pool.host}:{http.port} and grpc://{grpc.address}")
    await stopped.wait()
    await asyncio.gather(http.stop(DRAIN_TIMEOUT_S), grpc.stop(DRAIN_TIMEOUT_S))
    for client in clients.values():
        await client.close()


def _stop_event() -> asyncio.Event:
    """Set by SIGINT or SIGTERM. Installed before anything is loaded, so that neither kills a process half-way."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    return stopped


def _export(registry: CollectorRegistry, host: str, port: int | None) -> str:
    """Serves a registry to Prometheus, on a thread of its own; None: not at all. What to announce of it."""
    if port is None:
        return ""
    server, _ = start_http_server(port, host, registry)
    return f", metrics on http://{host}:{server.server_port}"


@contextmanager
def _clear_port_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.strerror or error}; choose another port or address") from error
