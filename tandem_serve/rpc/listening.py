"""What the gRPC servers and clients here have in common: addresses, options, health, reflection, time limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem_serve.rpc.tls import PeerTls

Option = tuple[str, int | str]

KEEPALIVE_TIME_MS = 10_000  # a peer that vanished without a word is noticed after this and the timeout
KEEPALIVE_TIMEOUT_MS = 5_000
INITIAL_RECONNECT_BACKOFF_MS = 200  # gRPC's own goes up to two minutes: a replaced peer would be found as late
MAX_RECONNECT_BACKOFF_MS = 2_000
CONNECT_TIMEOUT_MS = 2_000  # on a busy machine a TLS handshake takes some 200 ms


def server_options(max_message_bytes: int) -> list[Option]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a coin toss
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options() -> list[Option]:
    return [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", INITIAL_RECONNECT_BACKOFF_MS),
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        ("grpc.enable_retries", 0),  # a stream with state is never silently replayed
    ]


def bind(server: grpc.Server | grpc.aio.Server, host: str, port: int, tls: PeerTls | None = None) -> int:
    """Binds a port (0: any free one) and returns it. Raises OSError where it is taken."""
    address = f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, tls.server_credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    if bound == 0:
        raise OSError(f"cannot listen on {host}:{port}")
    return bound


class Health:
    """Health and reflection of one synchronous server."""

    def __init__(self, server: grpc.Server, services: Sequence[str]) -> None:
        self._servicer = health.HealthServicer()
        self._names = ["", *services]
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            self._servicer.set(name, status)


class AioServer:
    """One service on the running event loop, with health and reflection. A cancelled call closes its handler."""

    def __init__(
        self,
        service: str,
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]],
        *,
        max_message_bytes: int,
        host: str,
        port: int,
        tls: PeerTls | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
    ) -> None:
        """Binds the port (0: any free one); serves after start(). Needs a running loop. Raises OSError."""
        self._server = grpc.aio.server(options=server_options(max_message_bytes), interceptors=interceptors)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing from grpc-stubs
        self._names = ["", service]
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        reflection.enable_server_reflection([service, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        self._host = host
        self._port = bind(self._server, host, port, tls)

    @property
    def port(self) -> int:
        return self._port

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        await self._server.start()
        await self._set_serving(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Takes no new calls, gives running ones grace_s, then cancels them."""
        await self._set_serving(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)

    async def _set_serving(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._names:
            await self._servicer.set(name, status)


@contextmanager
def cancelled_after(timeout_s: float, cancel: Callable[[], object]) -> Iterator[threading.Event]:
    """Cancels a call unless the block ends within timeout_s; the event says whether that has happened."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        cancel()

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
