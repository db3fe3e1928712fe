"""The three pools as plain processes, without Ray, on real sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from click import unstyle
from typer.testing import CliRunner

from tandem_serve.cli import app as command_line
from tandem_serve.config import DrafterEngineConfig
from tandem_serve.models.decoder import DecoderConfig
from tandem_serve.serving.drafter import DrafterReplica
from tests.checkpoints import CONFIG
from tests.listeners import listeners
from tests.otlp_collector import Collector
from tests.prometheus_server import IS_INSTALLED, Prometheus
from tests.serving_contract import LONG, PROMPT, Cluster, ServingContract, eventually, make_pair
from tests.traced_request import check_one_request_is_one_trace

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0
OBSERVABILITY = """
observability:
  traces: {{endpoint: "{endpoint}", sample_ratio: 0}}
  logs: {{format: json, requests: true}}
"""


class Pools:
    """A drafter that can be killed and started again, a primary, and a router, each a process."""

    def __init__(self, folder: Path, config: DecoderConfig = CONFIG, primary_options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.collector = Collector()
        (folder / "observability.yaml").write_text(OBSERVABILITY.format(endpoint=self.collector.endpoint))
        self._primary_model, self._drafter_model = make_pair(folder, config)
        self._drafter, primary, http, grpc, *metrics = _free_addresses(7)
        self.metrics = dict(zip(("drafter", "primary", "router"), metrics, strict=True))
        self.ports = {
            role: {int(address.split(":")[1]) for address in (*own, self.metrics[role])}
            for role, own in {"drafter": [self._drafter], "primary": [primary], "router": [http, grpc]}.items()
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start_drafter()
        self._start(
            "primary",
            *("--model", self._primary_model, "--drafter", self._drafter, *_port(primary)),
            *primary_options,
        )
        self._start(
            "router",
            *("--model", self._primary_model, "--model-name", "tiny", "--primary", primary),
            *("--http-port", http.split(":")[1], "--grpc-port", grpc.split(":")[1]),
        )
        self.cluster = Cluster(f"http://{http}", grpc, "tiny", self.drafter_sequences)
        eventually(self._is_complete, "the three processes are up and linked", START_TIMEOUT_S)

    def start_drafter(self) -> None:
        self._start("drafter", "--model", self._drafter_model, *_port(self._drafter))

    def restart_drafter_here(self) -> DrafterReplica:
        """A drafter at the dead one's address, in this process: up at once, while sequences still run."""
        port = int(self._drafter.split(":")[1])
        return DrafterReplica(str(self._drafter_model), DrafterEngineConfig(), port=port)

    def listeners(self) -> dict[str, set[tuple[str, int]]]:
        return {role: listeners(process.pid) for role, process in self._processes.items()}

    def kill_drafter(self) -> None:
        self._processes["drafter"].kill()
        self._processes["drafter"].wait(30)

    def drafter_sequences(self) -> int:
        text = httpx.get(f"http://{self.metrics['drafter']}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("tandem:drafter_num_sequences ")]
        return int(float(lines[0].split()[1]))

    def stop(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)

    def exit_statuses(self) -> dict[str, int]:
        return {name: process.wait(30) for name, process in self._processes.items()}

    def log_lines(self, role: str) -> list[dict[str, Any]]:
        """A process's log, but for what it announces."""
        lines = (self.folder / f"{role}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def _start(self, role: str, *arguments: object) -> None:
        log = (self.folder / f"{role}.log").open("wb")
        command = [sys.executable, "-m", "tandem_serve.cli", role, *map(str, arguments)]
        command += ["--metrics-port", self.metrics[role].split(":")[1]]
        command += ["--observability", str(self.folder / "observability.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._processes[role] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _is_complete(self) -> bool:
        for role, process in self._processes.items():
            assert process.poll() is None, (self.folder / f"{role}.log").read_text()
        try:
            status = httpx.get(f"{self.cluster.http}/status", timeout=10).json()
        except httpx.TransportError:
            return False
        return any(drafter["linked_primaries"] for drafter in status["drafters"])


def _free_addresses(count: int) -> list[str]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()
    return addresses


def _port(address: str) -> tuple[str, str]:
    return "--port", address.split(":")[1]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(tmp_path_factory.mktemp("pools"))
    yield pools
    pools.stop()
    pools.collector.close()
    assert pools.exit_statuses() == {"drafter": 0, "primary": 0, "router": 0}


@pytest.fixture(scope="module")
def cluster(pools: Pools) -> Cluster:
    return pools.cluster


class TestPlainProcesses(ServingContract):
    def test_a_drafter_may_die_and_come_back_in_mid_stream(self, pools: Pools, cluster: Cluster) -> None:
        """No token changes, and the running sequence gets its drafts back."""
        body = {"temperature": 0.9, "seed": 3, "max_tokens": LONG, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        successors: list[DrafterReplica] = []
        choices = cluster.choices_while(
            {5: pools.kill_drafter, 50: lambda: successors.append(pools.restart_drafter_here())}, **body
        )
        try:
            assert "".join(choice["text"] for choice in choices) == plain
            accepted = [choice["num_accepted_tokens"] for choice in choices]
            assert sum(accepted[:5]) > 0
            assert 0 in [sum(accepted[i : i + 20]) for i in range(len(accepted))], "there was a time without a drafter"
            assert sum(accepted[-50:]) > 0, "the running sequence found the drafter's successor"
        finally:
            successors[0].close()
        pools.start_drafter()
        eventually(lambda: "metrics" in cluster.complete(max_tokens=16), "acceptance comes back", START_TIMEOUT_S)

    def test_unverified_tandem_over_http(self, cluster: Cluster) -> None:
        """From the API to the drafter and back. At no drafts a block it is the primary's own text."""
        plain = cluster.text(block_length=0)
        assert cluster.text(speculation={"mode": "tandem", "block_length": 0}) == plain
        modes = ("tandem", "tandem-representations") * 2
        texts = [cluster.text(speculation={"mode": mode, "block_length": 8}) for mode in modes]
        assert texts[:2] == texts[2:]
        assert plain not in texts

    def test_they_listen_where_they_were_told_to_and_on_loopback_alone(self, pools: Pools) -> None:
        expected = {role: {("127.0.0.1", port) for port in ports} for role, ports in pools.ports.items()}
        assert pools.listeners() == expected

    def test_one_request_is_one_trace_through_all_pools(self, pools: Pools, cluster: Cluster) -> None:
        check_one_request_is_one_trace(cluster, pools.collector)

    def test_a_request_has_one_name_in_every_log(self, pools: Pools, cluster: Cluster) -> None:
        body = {"model": cluster.model, "prompt": PROMPT, "max_tokens": 24}
        headers = {"X-Request-Id": "order-66"}
        response = httpx.post(f"{cluster.http}/v1/completions", json=body, headers=headers, timeout=60)
        assert response.headers["x-request-id"] == "order-66"
        assert response.json()["id"] == "cmpl-order-66"
        for role in ("router", "primary", "drafter"):

            def lines(role: str = role) -> list[dict[str, Any]]:
                return [line for line in pools.log_lines(role) if "order-66" in line.get("request_id", "")]

            eventually(lambda lines=lines: bool(lines()), f"the {role} names the request")
            assert lines()[0]["pool"] == role
        refused = httpx.post(f"{cluster.http}/v1/completions", json={}, headers={"X-Request-Id": "a b" * 99})
        assert refused.status_code == 400
        assert re.fullmatch("[0-9a-f]{32}", refused.headers["x-request-id"])  # one that no log should hold

    @pytest.mark.skipif(not IS_INSTALLED, reason="prometheus is missing: apt-get install prometheus")
    def test_every_query_of_the_dashboard_has_data(self, pools: Pools, cluster: Cluster) -> None:
        dashboard = json.loads((ROOT / "observability" / "dashboard.json").read_text())
        queries = {target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
        assert len(queries) > 50
        missing = sorted(query.replace("$__rate_interval", "10s") for query in queries)
        prometheus = Prometheus(pools.folder, pools.metrics)

        def all_have_had_data() -> bool:
            cluster.complete(temperature=0.9, max_tokens=32)
            missing[:] = [query for query in missing if not prometheus.query(query)]
            return not missing

        try:
            eventually(all_have_had_data, "data for all queries", 60.0)
        except AssertionError:
            raise AssertionError(f"no data for {missing}") from None
        finally:
            prometheus.close()

    @pytest.mark.parametrize("source", ["--url", "--grpc", "--pair"])
    def test_the_complete_command_shows_where_text_came_from(self, pools: Pools, cluster: Cluster, source: str) -> None:
        where = {"--url": cluster.http, "--grpc": cluster.grpc, "--pair": str(pools.folder)}[source]
        arguments = ["complete", PROMPT, source, where, "--max-tokens", "48"]
        result = CliRunner().invoke(command_line, arguments, color=True)
        assert result.exit_code == 0, result.output
        text = cluster.text()
        assert PROMPT + text in unstyle(result.stdout)
        green = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", result.stdout, re.DOTALL)
        assert 0 < len("".join(green)) < len(text)
        assert "drafts accepted" in result.stderr

    def test_the_status_command_lists_both_pools(self, cluster: Cluster) -> None:
        result = CliRunner().invoke(command_line, ["status", "--url", cluster.http])
        assert result.exit_code == 0, result.output
        assert len(re.findall(r"127\.0\.0\.1:\d+", result.output)) >= 2

    def test_commands_say_where_nobody_answers(self) -> None:
        nowhere = _free_addresses(1)[0]
        for arguments in (["status", "--url", f"http://{nowhere}"], ["complete", "a", "--url", f"http://{nowhere}"]):
            result = CliRunner().invoke(command_line, arguments)
            assert (result.exit_code, nowhere in result.output) == (1, True)
            assert "Traceback" not in result.output

    def test_a_stream_outlives_the_order_to_stop(self, pools: Pools, cluster: Cluster) -> None:
        """The last test: it ends all three processes."""
        body = {"temperature": 0.9, "seed": 5, "max_tokens": LONG, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        choices = cluster.choices_while({5: pools.stop}, **body)
        assert "".join(choice["text"] for choice in choices) == plain
        assert pools.exit_statuses() == {"drafter": 0, "primary": 0, "router": 0}
