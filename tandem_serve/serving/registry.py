"""Which replicas this process knows of, by Serve application.

Serve makes request routers (discovery.py) itself, one for each handle, and offers no way to hand them anything: what
they learn must lie where the replica can find it. This is the one piece of process-wide state in the package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

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

    def watch(self, application: str, watcher: Watcher) -> Callable[[], None]:
        """Calls watcher now, if anything is known, and with every change. It must not block. Returns how to stop."""
        with self._lock:
            self._watchers.setdefault(application, []).append(watcher)
            if application in self._replicas:
                watcher(self._replicas[application])

        def stop() -> None:
            with self._lock:
                self._watchers[application].remove(watcher)

        return stop


REGISTRY = ReplicaRegistry()
