"""Which replicas this process knows of, by Serve application.

Serve makes request routers (discovery.py) itself, one for each handle, and offers no way to hand them anything: what
they learn must lie where the replica can find it. This is the one piece of process-wide state in the package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tandem_serve.serving.exposition import MetricsServer, Target

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

PRIMARY, DRAFTER, ROUTER = "Primary", "Drafter", "Router"  # deployments; each is the only one of its application
ADDRESS = "address"  # of a drafter's metadata: where it drafts
NODE = "node"  # of every replica's metadata, added by discovery: Ray's id of the node that it runs on
METRICS = "metrics"  # of every replica's metadata: where it serves them, if it does

Replicas = Mapping[str, Mapping[str, Any]]  # replica id -> what it published of itself
Watcher = Callable[[Replicas], None]


class ReplicaRegistry:
    """Replicas by application, and who wants to hear of changes. Thread-safe: Serve's routers run on their own loop.

    A replica that is gone from here gets no new sequences; what runs on it runs on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._watchers: dict[str, list[Watcher]] = {}

    def publish(self, application: str, replicas: Replicas) -> None:
        """Replaces what is known of an application; tells its watchers, on the caller's thread, if it is news."""
        with self._lock:
            if self._replicas.get(application) == replicas:
                return
            self._replicas[application] = dict(replicas)
            for watcher in self._watchers.get(application, []):
                watcher(replicas)  # under the lock: in order

    def watch(self, application: str, watcher: Watcher) -> None:
        """Calls watcher now, if anything is known, and with every change. It must not block."""
        with self._lock:
            self._watchers.setdefault(application, []).append(watcher)
            if application in self._replicas:
                watcher(self._replicas[application])


REGISTRY = ReplicaRegistry()


def discover(deployment: str, application: str, watcher: Watcher) -> DeploymentHandle[Any]:
    """Calls watcher with a deployment's replicas, now and with every change, on any thread, while the handle lives.

    The deployment may not exist yet.
    """
    from ray import serve

    REGISTRY.watch(application, watcher)
    handle = serve.get_deployment_handle(deployment, application, _check_exists=False)
    handle.info.remote()  # a handle makes its request router, and so learns the replicas, with its first call
    return handle


def node_address() -> str:
    """Of the node that this replica runs on, as other nodes reach it."""
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def replica_name() -> str:
    """Of the Serve replica that this process is."""
    from ray import serve

    name: str = serve.get_replica_context().replica_id.unique_id
    return name


def metrics_metadata(metrics: MetricsServer | None) -> dict[str, str]:
    """What a replica publishes of its metrics."""
    return {} if metrics is None else {METRICS: metrics.address}


def metrics_targets(pool: str, found: Replicas) -> list[Target]:
    """Where the replicas of a pool serve their metrics."""
    return [
        Target(metadata[METRICS], {"pool": pool.lower(), "replica": replica_id})
        for replica_id, metadata in found.items()
        if METRICS in metadata
    ]


def drafter_addresses(found: Replicas) -> list[str]:
    """Where the drafters listen."""
    return [metadata[ADDRESS] for metadata in found.values() if ADDRESS in metadata]


def nodes(found: Replicas) -> dict[str, str]:
    """The node of each replica, by its id, and of drafters by their address."""
    return {
        name: metadata[NODE]
        for replica_id, metadata in found.items()
        if NODE in metadata
        for name in (replica_id, metadata.get(ADDRESS, replica_id))
    }
