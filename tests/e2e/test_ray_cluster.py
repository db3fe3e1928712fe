"""`tandem-serve up` on a real, local Ray: three applications, primary and drafter in replicas of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import listeners
from tests.serving_contract import LONG, Cluster, ServingContract, eventually, make_pair

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START_TIMEOUT_S = 240.0  # half a minute on an idle machine of two cores
REPLACE_TIMEOUT_S = 120.0
MARK = "TANDEM_TEST_CLUSTER"  # in the environment of every process of the cluster, wherever Ray starts it
FILE = """
name: tiny
primary: {model: primary, resources: {num_cpus: 0.5}, engine: {kv_cache_tokens: 16384}}
drafter: {model: drafter, resources: {num_cpus: 0.5}}
router: {model_name: tiny, http_port: 0, grpc_port: 0}
"""


class Up:
    """A running `tandem-serve up`."""

    def __init__(self, folder: Path) -> None:
        make_pair(folder)
        (folder / "cluster.yaml").write_text(FILE)
        self._mark = uuid.uuid4().hex
        self._log = folder / "up.log"
        environment = {
            **os.environ,
            MARK: self._mark,
            "HOME": str(folder),  # Ray writes a token into it
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tandem_serve.cli", "up", str(folder / "cluster.yaml")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        eventually(self._is_up, "the cluster is up", START_TIMEOUT_S)
        http, grpc = re.findall(r"[\d.]+:\d+", self._log.read_text())
        self.cluster = Cluster(f"http://{http}", grpc, "tiny", self._drafter_sequences)
        eventually(lambda: bool(self.linked_drafters()), "the primary is linked to the drafter")

    def linked_drafters(self) -> set[str]:
        status = httpx.get(f"{self.cluster.http}/status", timeout=10).json()
        return {drafter["address"] for drafter in status["drafters"] if drafter["linked_primaries"]}

    def kill_replica(self, deployment: str) -> None:
        """SIGKILL."""
        found = [pid for pid in self.processes() if _command(pid).startswith(f"ray::ServeReplica:tiny-{deployment}")]
        assert len(found) == 1
        os.kill(found[0], signal.SIGKILL)

    def processes(self) -> list[int]:
        """Every process of the cluster that lives."""
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and self._is_ours(entry)]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def exit_status(self) -> int:
        return self._process.wait(120)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        return "Ctrl-C" in self._log.read_text()

    def _is_ours(self, entry: Path) -> bool:
        try:
            return (
                f"{MARK}={self._mark}".encode() in (entry / "environ").read_bytes() and _command(int(entry.name)) != ""
            )
        except OSError:  # gone meanwhile, or not ours to look at
            return False

    def _drafter_sequences(self) -> int:
        return int(sum(self.samples("drafter", "tandem:drafter_num_sequences")))

    def samples(self, pool: str, name: str) -> list[float]:
        """A metric of every replica of a pool, as Prometheus finds and scrapes them."""
        groups = httpx.get(f"{self.cluster.http}/metrics/targets", timeout=10).json()
        addresses = [address for group in groups if group["labels"]["pool"] == pool for address in group["targets"]]
        texts = [httpx.get(f"http://{address}/metrics", timeout=10).text for address in addresses]
        pattern = re.compile(rf"^{name}(?:{{.*}})? (.*)$", re.MULTILINE)
        return [float(value) for text in texts for value in pattern.findall(text)]


def _command(pid: int) -> str:
    """Empty for a process that is dead and only not yet waited for."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("ray"))
    yield up
    up.stop()
    assert up.exit_status() == 0
    eventually(lambda: not up.processes(), "no process is left behind")


@pytest.fixture(scope="session")
def cluster(up: Up) -> Cluster:
    return up.cluster


class TestRayCluster(ServingContract):
    def test_every_replica_of_every_pool_is_scraped_by_itself(self, up: Up, cluster: Cluster) -> None:
        cluster.complete(max_tokens=8)
        for pool, name in (
            ("router", "tandem:router_generation_tokens_total"),
            ("primary", "vllm:generation_tokens_total"),
            ("drafter", "tandem:drafter_draft_tokens_total"),
        ):
            assert [value > 0 for value in up.samples(pool, name)] == [True], pool

    def test_killing_the_drafter_in_mid_stream_changes_no_token(self, up: Up, cluster: Cluster) -> None:
        body = {"temperature": 0.9, "seed": 3, "max_tokens": LONG, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        before = up.linked_drafters()
        choices = cluster.choices_while({5: lambda: up.kill_replica("drafter")}, **body)
        assert "".join(choice["text"] for choice in choices) == plain
        eventually(lambda: bool(up.linked_drafters() - before), "the drafter's successor is found", REPLACE_TIMEOUT_S)
        eventually(lambda: "metrics" in cluster.complete(), "acceptance comes back")

    def test_killing_the_primary_in_mid_stream_changes_no_token(self, up: Up, cluster: Cluster) -> None:
        body = {"temperature": 0.9, "seed": 4, "max_tokens": LONG, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        choices = cluster.choices_while({5: lambda: up.kill_replica("primary")}, **body)
        assert "".join(choice["text"] for choice in choices) == plain

    def test_it_listens_where_the_documentation_says(self, up: Up, cluster: Cluster) -> None:
        ports = {
            int(cluster.http.rsplit(":", 1)[1]): "router.http_port",
            int(cluster.grpc.rsplit(":", 1)[1]): "router.grpc_port",
        }
        eventually(lambda: bool(up.linked_drafters()), "there is a drafter")
        ports |= {9520 + i: "observability.metrics.port" for i in range(16)}
        ports |= {int(address.rsplit(":", 1)[1]): "drafter" for address in up.linked_drafters()}
        assert listeners.found(up.processes(), ports) == listeners.documented()

    def test_a_stream_outlives_the_order_to_stop(self, up: Up, cluster: Cluster) -> None:
        """The last test: it ends the cluster."""
        body = {"temperature": 0.9, "seed": 5, "max_tokens": LONG, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        assert up.processes()
        choices = cluster.choices_while({5: up.stop}, **body)
        assert "".join(choice["text"] for choice in choices) == plain
        assert up.exit_status() == 0
        eventually(lambda: not up.processes(), "no process is left behind")
