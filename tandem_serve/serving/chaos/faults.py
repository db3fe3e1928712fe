"""The faults: what is broken, and how long it takes until the cluster is whole again."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem_serve.serving.chaos.network import FAIR, Weather
from tandem_serve.serving.chaos.simulation import Replica, Simulation, patiently

RECOVERY_TIMEOUT_S = 180.0
_POLL_INTERVAL_S = 0.2
_POOLS = ("primary", "drafter", "router")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault that was injected. Times are time.monotonic's."""

    kind: str
    target: str
    started: float
    recovered: float | None  # None: not within RECOVERY_TIMEOUT_S


class FaultInjector:
    """Injects faults into a simulated cluster, one at a time, and waits until it is whole after each.

    Blocks: clients run in another thread.
    """

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self._simulation = simulation
        self._rng = random.Random(seed)
        self._num_upgrades = 0
        self._drafters: Any = None  # a handle, once it is needed
        self._gone: set[str] = set()  # replica ids that must not come back
        self.kinds: dict[str, Callable[[], str]] = {
            "primary killed": lambda: self._kill("primary"),
            "drafter killed": lambda: self._kill("drafter"),
            "router killed": lambda: self._kill("router"),
            "controller killed": self._kill_controller,
            "primary node lost": lambda: self._lose_node("primary"),
            "drafter node lost": lambda: self._lose_node("drafter"),
            "drafter slow": self._stop_drafter,
            "network delayed": lambda: self._bad_weather(Weather(delay_s=self._rng.uniform(0.02, 0.3))),
            "network stalled": lambda: self._bad_weather(Weather(is_stalled=True)),
            "network cut": lambda: self._bad_weather(Weather(is_cut=True)),
            "primary upgraded": lambda: self._upgrade("primary"),
            "drafter upgraded": lambda: self._upgrade("drafter"),
            "router upgraded": lambda: self._upgrade("router"),
        }

    def schedule(self, num_faults: int) -> list[str]:
        """Which kinds, in which order: each once, then at random."""
        kinds = list(self.kinds)
        self._rng.shuffle(kinds)
        return (kinds + self._rng.choices(kinds, k=max(num_faults - len(kinds), 0)))[:num_faults]

    def inject(self, kind: str) -> Fault:
        started = time.monotonic()
        target = self.kinds[kind]()
        while not self._is_whole():
            if time.monotonic() - started > RECOVERY_TIMEOUT_S:
                return Fault(kind, target, started, None)
            time.sleep(_POLL_INTERVAL_S)
        return Fault(kind, target, started, time.monotonic())

    # -------------------------------------------------------------- faults

    def _pick(self, pool: str) -> Replica:
        return self._rng.choice(self._simulation.replicas(pool))

    def _kill(self, pool: str) -> str:
        replica = self._pick(pool)
        self._gone.add(replica.replica_id)
        os.kill(replica.pid, signal.SIGKILL)
        return replica.replica_id

    def _kill_controller(self) -> str:
        import ray

        from tandem_serve.serving import deploying

        ray.kill(deploying.controller(), no_restart=False)
        return "Serve's controller"

    def _lose_node(self, pool: str) -> str:
        lost = self._simulation.replace_node(pool, self._rng)
        self._gone |= {replica.replica_id for replica in lost}
        return f"a node with {len(lost)} {pool}s"

    def _stop_drafter(self) -> str:
        """For up to two seconds it does nothing at all, but keeps its connections."""
        replica = self._pick("drafter")
        os.kill(replica.pid, signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.5, 2.0))
        os.kill(replica.pid, signal.SIGCONT)
        return replica.replica_id

    def _bad_weather(self, weather: Weather) -> str:
        replica = self._pick("drafter")
        self._set_weather(replica, weather)
        time.sleep(self._rng.uniform(0.5, 3.0))
        for each in self._simulation.replicas("drafter"):
            self._set_weather(each, FAIR)
        return f"before {replica.replica_id}"

    def _set_weather(self, replica: Replica, weather: Weather) -> None:
        from ray import serve

        from tandem_serve.serving import app
        from tandem_serve.serving.registry import DRAFTER

        if self._drafters is None:
            self._drafters = serve.get_deployment_handle(
                DRAFTER, app.application_names(self._simulation.config.name)[1]
            )
            self._drafters._init(_run_router_in_separate_loop=True)  # there is no event loop in this thread
        self._drafters.set_weather.remote(weather, replica_id=replica.replica_id).result(timeout_s=30)

    def _upgrade(self, pool: str) -> str:
        self._num_upgrades += 1
        self._gone |= {replica.replica_id for replica in self._simulation.replicas(pool)}
        config = self._simulation.config
        changed = getattr(config, pool).model_copy(update={"revision": str(self._num_upgrades)})
        patiently(lambda: self._simulation.deploy(config.model_copy(update={pool: changed})))
        return f"every {pool}"

    # -------------------------------------------------------------- recovery

    def _is_whole(self) -> bool:
        """Every pool has its full number of replicas, none of those broken among them, all linked and answering."""
        config = self._simulation.config
        for pool in _POOLS:
            running = {replica.replica_id for replica in self._simulation.replicas(pool)}
            if len(running) != getattr(config, pool).num_replicas or running & self._gone:
                return False
        try:
            with urllib.request.urlopen(f"{self._simulation.url}/status", timeout=5) as response:
                status: dict[str, Any] = json.load(response)
        except (OSError, ValueError):
            return False
        primaries = [each["name"] for each in status["primaries"] if each["status"] is not None]
        linked = [each for each in status["drafters"] if set(each["linked_primaries"]) == set(primaries)]
        return len(primaries) == config.primary.num_replicas and len(linked) == config.drafter.num_replicas
