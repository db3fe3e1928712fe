"""Which replicas this process knows of, by Serve application.

Serve makes request routers (discovery.py) itself, one for each handle, and offers no way to hand them anything: what
they learn must lie where the replica can find it. This is the one piece of process-wide state in the package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

PRIMARY, DRAFTER, ROUTER = "Primary", "Drafter", "Router"  # deployments; each is the only one of its application
ADDRESS = "address"  # key of a drafter's metadata

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


def drafter_addresses(found: Replicas) -> list[str]:
    """Where the drafters listen."""
    return [metadata[ADDRESS] for metadata in found.values() if ADDRESS in metadata]
