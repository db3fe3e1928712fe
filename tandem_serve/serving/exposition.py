"""How Prometheus reaches a replica: one HTTP port each, and a list of them all for its service discovery."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest

logger = logging.getLogger(__name__)

NUM_PORTS = 16  # replicas of one node that find a port each


@dataclass(frozen=True, slots=True)
class Target:
    """A replica's metrics, for Prometheus's HTTP service discovery."""

    address: str  # host:port
    labels: Mapping[str, str] = field(default_factory=dict)


def http_sd(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """As https://prometheus.io/docs/prometheus/latest/http_sd/ wants it."""
    return [{"targets": [target.address], "labels": dict(target.labels)} for target in targets]


class _Server(ThreadingHTTPServer):
    """Answers GET with a registry's figures, in the classic text format whatever the scraper would rather have.

    prometheus_client's own server offers OpenMetrics too, where it writes underscores for the colons in our names.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry) -> None:
        super().__init__(address, _Handler)
        self.registry = registry


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0  # seconds that a connection may say nothing

    def do_GET(self) -> None:
        body = generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no news."""


class MetricsServer:
    """Serves a registry, and the process's own figures, on a thread of its own until `close`."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int, num_ports: int = 1) -> None:
        """Listens on the first free port of num_ports from `port` on (0: any free one). Raises OSError."""
        ProcessCollector(registry=registry)
        for candidate in range(port, port + (num_ports if port else 1)):
            try:
                self._server = _Server((host, candidate), registry)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or candidate == port + num_ports - 1:
                    raise
            else:
                break
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(registry: CollectorRegistry, host: str, port: int | None) -> MetricsServer | None:
    """A replica's metrics; None for no port, and where none is free: that is logged, and the replica lives without."""
    if port is None:
        return None
    try:
        return MetricsServer(registry, host=host, port=port, num_ports=NUM_PORTS)
    except OSError as error:
        logger.warning("no metrics: none of the ports %d to %d on %s: %s", port, port + NUM_PORTS - 1, host, error)
        return None
