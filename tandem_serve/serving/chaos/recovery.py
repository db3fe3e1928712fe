"""When a broken cluster is whole again: what is seen of it from outside, against what was broken."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_serve.serving.chaos.simulation import POOLS, Replica, Simulation

RECOVERY_TIMEOUT_S = 180.0
LINKS = "links"  # what a bad network breaks; and "controller", which is no pool either


@dataclass(slots=True)
class Fault:
    """One fault that was injected. Times are time.monotonic's."""

    kind: str
    part: str  # of the cluster that it broke: a pool, LINKS or "controller"
    target: str
    gone: frozenset[str]  # ids of replicas that must not come back
    started: float
    recovered: float | None = None  # None: not yet, or not within RECOVERY_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Health:
    """One look at the cluster."""

    running: Mapping[str, list[Replica]]  # by pool, as the controller knows; of more than are wanted, those that leave
    wanted: Mapping[str, int]
    answering: frozenset[str]  # primaries that answer a router; empty where no router answers
    num_linked: int | None  # drafters that all primaries that answer are linked to; None: no router answers

    def has_recovered(self, fault: Fault) -> bool:
        """Whether what the fault broke works again, all of it, with none of what was broken."""
        if fault.part == "controller":
            return True  # it was it who told what runs
        if fault.part == LINKS:
            return self.num_linked is not None and self.num_linked >= len(self.running["drafter"])
        ids = {replica.replica_id for replica in self.running[fault.part]}
        if len(ids) != self.wanted[fault.part] or ids & fault.gone:
            return False
        if fault.part == "primary":
            return self.answering == ids
        return self.num_linked is not None if fault.part == "router" else self.num_linked == len(ids)


def look_at(simulation: Simulation) -> Health:
    """Waits for a controller that is being restarted, not for anybody else."""
    running = simulation.replicas_by_pool()
    wanted = {pool: getattr(simulation.config, pool).num_replicas for pool in POOLS}
    try:
        with urllib.request.urlopen(f"{simulation.url}/status", timeout=5) as response:
            status: dict[str, Any] = json.load(response)
    except (OSError, ValueError):
        return Health(running, wanted, frozenset(), None)
    answering = frozenset(each["name"] for each in status["primaries"] if each["status"] is not None)
    linked = [each for each in status["drafters"] if answering and set(each["linked_primaries"]) >= answering]
    return Health(running, wanted, answering, len(linked))
