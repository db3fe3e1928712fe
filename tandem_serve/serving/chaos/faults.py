"""The faults: what is broken, and when."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tandem_serve.serving.chaos.network import Weather
from tandem_serve.serving.chaos.recovery import LINKS, RECOVERY_TIMEOUT_S, Fault, look_at
from tandem_serve.serving.chaos.simulation import Replica, Simulation, patiently

_POLL_INTERVAL_S = 0.25
_CONTROLLER = "controller"


class _Hit(NamedTuple):
    """What a fault has broken: in words, and which replicas are not to come back."""

    target: str
    gone: frozenset[str] = frozenset()


class FaultInjector:
    """Injects faults into a simulated cluster, and watches what they broke heal.

    Parts of the cluster (each pool, the links between two, the controller) heal at the same time; a part that has not
    healed is not broken again, so that there is something to break. Blocks: clients run in another thread.
    """

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self._simulation = simulation
        self._rng = random.Random(seed)
        self._num_upgrades = 0
        self._drafters: Any = None  # a handle, once it is needed
        self.faults: list[Fault] = []
        self.kinds: dict[str, tuple[str, Callable[[], _Hit]]] = {  # which part, and how
            "primary killed": ("primary", lambda: self._kill("primary")),
            "drafter killed": ("drafter", lambda: self._kill("drafter")),
            "router killed": ("router", lambda: self._kill("router")),
            "controller killed": (_CONTROLLER, self._kill_controller),
            "primary node lost": ("primary", lambda: self._lose_node("primary")),
            "drafter node lost": ("drafter", lambda: self._lose_node("drafter")),
            "drafter slow": (LINKS, self._stop_drafter),
            "network delayed": (LINKS, lambda: self._bad_weather(Weather(delay_s=self._rng.uniform(0.02, 0.3)))),
            "network stalled": (LINKS, lambda: self._bad_weather(Weather(is_stalled=True))),
            "network cut": (LINKS, lambda: self._bad_weather(Weather(is_cut=True))),
            "primary upgraded": ("primary", lambda: self._upgrade("primary")),
            "drafter upgraded": ("drafter", lambda: self._upgrade("drafter")),
            "router upgraded": ("router", lambda: self._upgrade("router")),
        }

    def schedule(self, num_faults: int) -> list[str]:
        """Which kinds, in which order: each once, then at random."""
        kinds = list(self.kinds)
        self._rng.shuffle(kinds)
        return (kinds + self._rng.choices(kinds, k=max(num_faults - len(kinds), 0)))[:num_faults]

    def inject_all(self, kinds: Sequence[str], progress: Callable[[str], None]) -> None:
        """Injects these faults, each as soon as the part that it breaks is whole, and waits until all has healed."""
        left = list(kinds)
        while left:
            self._observe()
            healing = {fault.part for fault in self._open_faults()}
            kind = next((kind for kind in left if self.kinds[kind][0] not in healing), None)
            if kind is None:
                time.sleep(_POLL_INTERVAL_S)
                continue
            left.remove(kind)
            progress(f"fault {len(kinds) - len(left)} of {len(kinds)}: {kind}")
            self._inject(kind)
        progress("waiting until everything has healed")
        while self._open_faults():
            time.sleep(_POLL_INTERVAL_S)
            self._observe()

    def _inject(self, kind: str) -> None:
        part, break_it = self.kinds[kind]
        started = time.monotonic()
        hit = break_it()
        self.faults.append(Fault(kind, part, hit.target, hit.gone, started))

    def _open_faults(self) -> list[Fault]:
        latest = time.monotonic() - RECOVERY_TIMEOUT_S
        return [fault for fault in self.faults if fault.recovered is None and fault.started > latest]

    def _observe(self) -> None:
        """Takes down what has healed."""
        health = look_at(self._simulation)
        self._simulation.yield_to_newcomers(health.running)
        for fault in self._open_faults():
            if health.has_recovered(fault):
                fault.recovered = time.monotonic()

    def _pause(self, seconds: float) -> None:
        """Meanwhile other parts heal."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._observe()
            time.sleep(min(_POLL_INTERVAL_S, left))

    # -------------------------------------------------------------- faults

    def _pick(self, pool: str) -> Replica:
        """Any that runs; waits for one. The controller takes a dead replica for a running one for some seconds."""
        gone = frozenset[str]().union(*(fault.gone for fault in self.faults))
        while not (running := [each for each in self._simulation.replicas_by_pool()[pool] if _lives(each, gone)]):
            time.sleep(_POLL_INTERVAL_S)
        return self._rng.choice(running)

    def _kill(self, pool: str) -> _Hit:
        replica = self._pick(pool)
        with contextlib.suppress(ProcessLookupError):  # it has died by itself, which is as good
            os.kill(replica.pid, signal.SIGKILL)
        return _Hit(replica.replica_id, frozenset({replica.replica_id}))

    def _kill_controller(self) -> _Hit:
        import ray

        from tandem_serve.serving import deploying

        ray.kill(deploying.controller(), no_restart=False)
        return _Hit("Serve's controller")

    def _lose_node(self, pool: str) -> _Hit:
        lost = self._simulation.replace_node(pool, self._rng)
        return _Hit(f"a node with {len(lost)} {pool}s", frozenset(replica.replica_id for replica in lost))

    def _stop_drafter(self) -> _Hit:
        """For up to two seconds it does nothing at all, but keeps its connections."""
        replica = self._pick("drafter")
        with contextlib.suppress(ProcessLookupError):  # lost with its node meanwhile
            os.kill(replica.pid, signal.SIGSTOP)
            try:
                self._pause(self._rng.uniform(0.5, 2.0))
            finally:  # whatever becomes of the trial
                os.kill(replica.pid, signal.SIGCONT)
        return _Hit(replica.replica_id)

    def _bad_weather(self, weather: Weather) -> _Hit:
        """It clears up by itself, whatever becomes of this process's way to the replica."""
        replica, seconds = self._pick("drafter"), self._rng.uniform(0.5, 3.0)
        self._set_weather(replica, weather, seconds)
        self._pause(seconds)
        return _Hit(f"before {replica.replica_id}")

    def _set_weather(self, replica: Replica, weather: Weather, seconds: float) -> None:
        from ray import serve

        from tandem_serve.serving import app
        from tandem_serve.serving.registry import DRAFTER

        if self._drafters is None:
            self._drafters = serve.get_deployment_handle(
                DRAFTER, app.application_names(self._simulation.config.name)[1]
            )
            self._drafters._init(_run_router_in_separate_loop=True)  # there is no event loop in this thread

        def tell() -> None:
            if _lives(replica):  # one that has gone has no weather
                self._drafters.set_weather.remote(weather, seconds, replica_id=replica.replica_id).result(timeout_s=10)

        patiently(tell)

    def _upgrade(self, pool: str) -> _Hit:
        self._num_upgrades += 1
        simulation = self._simulation
        old = frozenset(replica.replica_id for replica in simulation.replicas_by_pool()[pool])
        changed = getattr(simulation.config, pool).model_copy(update={"revision": str(self._num_upgrades)})
        patiently(lambda: simulation.deploy(simulation.config.model_copy(update={pool: changed}), waits=False))
        return _Hit(f"every {pool}", old)


def _lives(replica: Replica, gone: frozenset[str] = frozenset()) -> bool:
    if replica.replica_id in gone:
        return False
    try:
        os.kill(replica.pid, 0)
    except ProcessLookupError:
        return False
    return True
