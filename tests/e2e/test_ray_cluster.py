"""`tandem-serve up` on a real, local Ray: three applications, primary and drafter in replicas of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import httpx
import pytest

from tests import listeners
from tests.otlp_collector import Collector
from tests.serving_contract import LONG, Cluster, ServingContract, eventually, make_pair
from tests.traced_request import check_one_request_is_one_trace

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START_TIMEOUT_S = 240.0  # half a minute on an idle machine of two cores
REPLACE_TIMEOUT_S = 120.0
MARK = "TANDEM_TEST_CLUSTER"  # in the environment of every process of the cluster, wherever Ray starts it
FILE = """
name: tiny
primary: {model: primary, resources: {num_cpus: 0.5}, engine: {kv_cache_tokens: 16384}}
drafter: {model: drafter, resources: {num_cpus: 0.5}}
router: {model_name: tiny, http_port: 0, grpc_port: 0}
observability: {traces: {endpoint: "COLLECTOR", sample_ratio: 0}}
"""


class Up:
    """A running `tandem-serve up`."""

    def __init__(self, folder: Path) -> None:
        make_pair(folder)
        self.collector = Collector()
        self._content = FILE.replace("COLLECTOR", self.collector.endpoint)
        self._file = folder / "cluster.yaml"
        self._file.write_text(self._content)
        self._mark = uuid.uuid4().hex
        self._log = folder / "up.log"
        self._environment = {
            **os.environ,
            MARK: self._mark,
            "HOME": str(folder),  # Ray writes a token into it
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tandem_serve.cli", "up", str(self._file)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        eventually(self._is_up, "the cluster is up", START_TIMEOUT_S)
        http, grpc, self.ray = re.findall(r"(?:http://|gRPC +|Ray +)([\d.]+:\d+)", self._log.read_text())
        self.cluster = Cluster(f"http://{http}", grpc, "tiny", self._drafter_sequences)
        eventually(lambda: bool(self.linked_drafters()), "the primary is linked to the drafter")

    def linked_drafters(self) -> set[str]:
        status = httpx.get(f"{self.cluster.http}/status", timeout=10).json()
        return {drafter["address"] for drafter in status["drafters"] if drafter["linked_primaries"]}

    def kill_replica(self, deployment: str) -> None:
        """SIGKILL."""
        (found,) = self.replicas(deployment)
        os.kill(found, signal.SIGKILL)

    def replicas(self, deployment: str) -> set[int]:
        """Process ids; of the router with an empty name."""
        name = f"ray::ServeReplica:tiny-{deployment}".removesuffix("-")
        return {pid for pid in self.processes() if _command(pid).startswith(f"{name}:")}

    def log_of(self, deployment: str) -> str:
        """What its only replica has written to standard error, which is a file of Ray's."""
        (replica,) = self.replicas(deployment)
        return Path(f"/proc/{replica}/fd/2").read_text()

    def has_replicas(self, deployment: str, count: int) -> bool:
        return len(self.replicas(deployment)) == count

    def apply(self, *options: str, **pools: str) -> str:
        """`tandem-serve apply` of the file with whole lines replaced; what it printed."""
        lines = {line.partition(":")[0]: line for line in self._content.strip().splitlines()} | pools
        self._file.write_text("\n".join(lines.values()))
        command = [sys.executable, "-m", "tandem_serve.cli", "apply", str(self._file), "--address", self.ray, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

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


@contextmanager
def streaming(cluster: Cluster) -> Iterator[None]:
    """Two clients stream meanwhile, one completion after the other; each must come whole and unchanged."""
    body = {"temperature": 0.9, "seed": 6, "max_tokens": 400, "ignore_eos": True}
    plain, texts, stop = cluster.text(block_length=0, **body), list[str](), Event()

    def stream() -> None:
        while not stop.is_set():
            texts.append("".join(choice["text"] for choice in cluster.choices_while({}, **body)))

    with ThreadPoolExecutor(2) as clients:
        running = [clients.submit(stream) for _ in range(2)]
        try:
            yield
        finally:
            stop.set()
        for client in running:
            client.result()
    assert texts
    assert set(texts) == {plain}


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("ray"))
    yield up
    up.stop()
    assert up.exit_status() == 0
    eventually(lambda: not up.processes(), "no process is left behind")
    up.collector.close()


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

    def test_log_lines_of_replicas_are_in_rays_worker_files(self, up: Up, cluster: Cluster) -> None:
        ready = "INFO tandem_serve.rpc.drafting_client: drafter "
        eventually(lambda: ready in up.log_of("primary"), "the primary's log names its drafter")

    def test_routers_hear_from_primaries_how_long_each_drafter_takes(self, up: Up, cluster: Cluster) -> None:
        cluster.complete(max_tokens=40, ignore_eos=True)
        (primary,) = httpx.get(f"{cluster.http}/status", timeout=10).json()["primaries"]
        waits = {load["address"]: load["wait_s"] for load in primary["status"]["loads"]}
        assert waits.keys() == up.linked_drafters()
        assert all(waits.values())

    def test_one_request_is_one_trace_through_all_pools(self, up: Up, cluster: Cluster) -> None:
        check_one_request_is_one_trace(cluster, up.collector)

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

    def test_apply_changes_pools_in_place_while_streams_run(self, up: Up, cluster: Cluster) -> None:
        pools = ("primary", "drafter", "")
        before = {pool: up.replicas(pool) for pool in pools}
        with streaming(cluster):
            said = up.apply(
                primary="primary: {model: primary, resources: {num_cpus: 0.5}, "
                "engine: {kv_cache_tokens: 16384, block_length: 2}}",
                drafter="drafter: {model: drafter, num_replicas: 2, resources: {num_cpus: 0.5}}",
                router="router: {model_name: tiny, http_port: 0, grpc_port: 0, limits: {max_n: 3}}",
            )
            assert said.count("[in place]") == 4, said  # two bounds, block length, limit
            eventually(lambda: len(up.linked_drafters()) == 2, "the primary is linked to the second drafter")
        assert httpx.post(f"{cluster.http}/v1/completions", json={"prompt": "a", "n": 4}).status_code == 400
        drafted = [choice["num_draft_tokens"] for choice in cluster.choices_while({}, temperature=0, max_tokens=48)]
        assert max(drafted) == 2
        after = {pool: up.replicas(pool) for pool in pools}
        assert {pool: before[pool] - after[pool] for pool in pools} == {pool: set() for pool in pools}
        assert [len(after[pool]) for pool in pools] == [1, 2, 1]

        said = up.apply("--dry-run", primary="primary: {model: primary, engine: {kv_cache_tokens: 8192}}")
        assert "engine.kv_cache_tokens: 16384 -> 8192  [restarts the pool]" in said
        assert {pool: up.replicas(pool) for pool in pools} == after
        with streaming(cluster):  # what is paired with the drafter that goes goes on
            up.apply()
            eventually(partial(up.has_replicas, "drafter", 1), "a drafter has gone", REPLACE_TIMEOUT_S)
        assert {pool: up.replicas(pool) for pool in ("primary", "")} == {pool: before[pool] for pool in ("primary", "")}

    def test_each_pool_grows_and_shrinks_by_its_own_need(self, up: Up, cluster: Cluster) -> None:
        """Two contrived loads: one that drafters find hard, one that primaries do. Texts do not notice, nor that the
        router tries block lengths all the while.
        """
        line = "{pool}: {{model: {pool}, resources: {{num_cpus: 0.5}}{engine}{autoscaling}}}"
        engine = ", engine: {kv_cache_tokens: 16384}"
        pace = "max_replicas: 2, upscale_delay_s: 0.5, downscale_delay_s: 1"
        easy, hard = (f", autoscaling: {{{pace}, target_occupancy: {target}}}" for target in (1, 0.01))
        for growing, other, targets in (("drafter", "primary", (easy, hard)), ("primary", "drafter", (hard, easy))):
            up.apply(
                primary=line.format(pool="primary", engine=engine, autoscaling=targets[0]),
                drafter=line.format(pool="drafter", engine="", autoscaling=targets[1]),
                router="router: {model_name: tiny, http_port: 0, grpc_port: 0, speculation: {adapts: true}}",
            )
            with streaming(cluster):
                eventually(partial(up.has_replicas, growing, 2), f"a second {growing}", REPLACE_TIMEOUT_S)
                assert up.has_replicas(other, 1)
            eventually(partial(up.has_replicas, growing, 1), f"one {growing} again", REPLACE_TIMEOUT_S)
            assert up.has_replicas(other, 1)
        assert "block lengths by sequences running: 1-" in up.log_of("")

    def test_a_stream_outlives_the_order_to_stop(self, up: Up, cluster: Cluster) -> None:
        """The last test: it ends the cluster."""
        body = {"temperature": 0.9, "seed": 5, "max_tokens": LONG, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        assert up.processes()
        choices = cluster.choices_while({5: up.stop}, **body)
        assert "".join(choice["text"] for choice in choices) == plain
        assert up.exit_status() == 0
        eventually(lambda: not up.processes(), "no process is left behind")
