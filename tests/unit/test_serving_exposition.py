"""Replicas' metrics over HTTP, and failing to serve them."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from tandem_serve.serving import exposition
from tandem_serve.serving.exposition import MetricsServer, serve_metrics


def a_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("tandem:things", "Things.", registry=registry).inc(3)
    return registry


def test_replicas_of_one_node_take_ports_one_after_the_other() -> None:
    first = MetricsServer(a_registry(), host="127.0.0.1", port=0)
    port = int(first.address.split(":")[1])
    second = MetricsServer(a_registry(), host="127.0.0.1", port=port, num_ports=16)
    try:
        assert port < int(second.address.split(":")[1]) < port + 16
        for server in (first, second):
            headers = {"Accept": "application/openmetrics-text;version=1.0.0"}  # what Prometheus would rather have
            text = httpx.get(f"http://{server.address}/metrics", headers=headers).text
            assert "tandem:things_total 3.0" in text
            assert "process_resident_memory_bytes" in text
    finally:
        first.close()
        second.close()


def test_a_replica_without_a_port_lives_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert serve_metrics(a_registry(), "127.0.0.1", None) is None
    taken = MetricsServer(a_registry(), host="127.0.0.1", port=0)
    monkeypatch.setattr(exposition, "NUM_PORTS", 1)
    try:
        assert serve_metrics(a_registry(), "127.0.0.1", int(taken.address.split(":")[1])) is None
    finally:
        taken.close()
    assert "no metrics" in caplog.text
