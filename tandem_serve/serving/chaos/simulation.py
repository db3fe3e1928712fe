"""A cluster of several Ray nodes on one machine: raylets of their own, told apart by labels."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tandem_serve.config import ClusterConfig
from tandem_serve.errors import Unavailable
from tandem_serve.serving.cluster import prepare_environment, with_free_ports

POOL = "pool"  # the node label
POOLS = ("primary", "drafter", "router")
_NODE = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20, "include_dashboard": False}
_NODE_ATTEMPTS = 3  # of half a minute
_NICENESS = 10  # of replicas that run


@dataclass(frozen=True, slots=True)
class Replica:
    """A running replica. Its node is one of the simulation's."""

    replica_id: str
    pid: int
    node_id: str


class Simulation:
    """A deployed cluster and the nodes under it. Router, controller and proxy live on the head, which nothing kills."""

    def __init__(self, config: ClusterConfig, ray_cluster: Any) -> None:
        self.config = config
        self.url = f"http://{config.router.host}:{config.router.http_port}"
        self._ray_cluster = ray_cluster
        self._nodes: dict[str, list[Any]] = {"primary": [], "drafter": []}
        self._niced: set[int] = set()

    def add_node(self, pool: str) -> None:
        """Tries again where a raylet does not come up: on a crowded machine one in some dozens does not."""
        for attempt in range(_NODE_ATTEMPTS):
            try:
                self._nodes[pool].append(self._ray_cluster.add_node(labels={POOL: pool}, **_NODE))
                return
            except Exception as error:  # Ray raises no other
                if attempt == _NODE_ATTEMPTS - 1:
                    raise Unavailable(f"no raylet comes up on this machine: {error}") from error

    def replace_node(self, pool: str, rng: random.Random) -> list[Replica]:
        """Kills one of a pool's nodes with all that runs there, which is returned, and plugs in an empty one."""
        node = self._nodes[pool].pop(rng.randrange(len(self._nodes[pool])))
        lost = [replica for replica in self.replicas_by_pool()[pool] if replica.node_id == node._node_id]
        self._ray_cluster.remove_node(node, allow_graceful=False)
        self.add_node(pool)
        return lost

    def deploy(self, config: ClusterConfig, *, waits: bool = True) -> None:
        """Brings the cluster to a (changed) configuration; unless told otherwise, waits until it is there."""
        from tandem_serve.serving import app, deploying
        from tandem_serve.serving.chaos.faulty_drafter import IMPORT_PATH

        _, drafter, _ = names = app.application_names(config.name)
        wanted = app.serve_config(config)
        for entry in wanted["applications"]:
            if entry["name"] == drafter:
                entry["import_path"] = IMPORT_PATH
        if waits:
            deploying.deploy(wanted, names)
        else:
            deploying.submit(wanted, names)
        self.config = config

    def replicas_by_pool(self) -> dict[str, list[Replica]]:
        """Those that run, as the controller knows; oldest first. Waits for a controller that is being restarted."""
        from tandem_serve.serving import app, deploying

        applications = patiently(lambda: deploying.details()["applications"])
        names = zip(POOLS, app.application_names(self.config.name), strict=True)
        return {pool: _running(applications.get(name, {"deployments": {}})) for pool, name in names}

    def yield_to_newcomers(self, running: Mapping[str, list[Replica]]) -> None:
        """Lets replicas that start have the cores first, as they would on machines of their own."""
        for replica in itertools.chain.from_iterable(running.values()):
            if replica.pid not in self._niced:
                self._niced.add(replica.pid)
                with contextlib.suppress(OSError):  # it has just gone
                    for thread in os.listdir(f"/proc/{replica.pid}/task"):
                        lower_priority(int(thread))


@contextmanager
def simulated_cluster(config: ClusterConfig, *, nodes_per_pool: int = 2) -> Iterator[Simulation]:
    """Starts nodes, Serve and the cluster; ends them all on the way out. Raises ConfigError, CheckpointError."""
    prepare_environment(is_one_machine=True)
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a handle's thread connects again while all is being ended
    import ray
    from ray.cluster_utils import Cluster

    from tandem_serve.serving import deploying

    logging.getLogger("ray").setLevel(logging.ERROR)
    config = _labelled(with_free_ports(config))
    ray_cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "labels": {POOL: "router"}})
    try:
        ray.init(address=ray_cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        simulation = Simulation(config, ray_cluster)
        for pool in ("primary", "drafter"):
            for _ in range(nodes_per_pool):
                simulation.add_node(pool)
        deploying.start_serve(config)
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # of a metric that it cannot report, say
        simulation.deploy(config)
        yield simulation
    finally:
        ray.shutdown()
        ray_cluster.shutdown()  # type: ignore[no-untyped-call]


def lower_priority(thread: int = 0) -> None:
    """Of a thread by its id; 0: of this one. See Simulation.yield_to_newcomers."""
    os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)


def patiently(ask: Any, timeout_s: float = 60.0) -> Any:
    """Asks again and again while the controller, or a replica, cannot answer."""
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except (ray.exceptions.RayError, KeyError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _running(application: Mapping[str, Any]) -> list[Replica]:
    found = [
        replica
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING" and replica.get("pid")
    ]
    found.sort(key=lambda replica: (replica["start_time_s"], replica["replica_id"]))
    return [Replica(each["replica_id"], each["pid"], each["node_id"]) for each in found]


def _labelled(config: ClusterConfig) -> ClusterConfig:
    """Each pool on the nodes of its own."""
    update = {}
    for name in POOLS:
        pool = getattr(config, name)
        resources = pool.resources.model_copy(update={"label_selector": {POOL: name}})
        update[name] = pool.model_copy(update={"resources": resources})
    return config.model_copy(update=update)
