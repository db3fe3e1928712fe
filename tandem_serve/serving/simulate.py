"""A discrete-event simulator of the pools under a trace of requests, to plan them: `tandem-serve simulate`.

Pairing (router.Pool), loads and the autoscaling policy (autoscaling.py) are the cluster's own code; engines are costs.
What it leaves out: drafters share the sequences evenly, prompts slow nobody else down, nothing ever fails.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tandem_serve.config import Autoscaling, ClusterConfig, DrafterAutoscaling, PrimaryAutoscaling
from tandem_serve.serving.autoscaling import (
    LOAD,
    DrafterSignals,
    LoadPolicy,
    PrimarySignals,
    drafter_load,
    primary_load,
)
from tandem_serve.serving.pairing import Pool
from tandem_serve.serving.planning import Arrival, Costs, percentiles

TICK_S = 1.0  # between two reports of the replicas, as in a cluster


# ------------------------------------------------------------------ a primary


@dataclass(slots=True)
class _Primary:
    """Sequences that all get tokens at the same rate. `served` counts what each has had since the replica began."""

    name: str
    served: float = 0.0
    updated_s: float = 0.0
    rate: float = 0.0  # tokens a second, of every running sequence
    running: list[tuple[float, int, Arrival]] = field(default_factory=list)  # a heap: ends when `served` is there
    waiting: deque[Arrival] = field(default_factory=deque)
    reserved_tokens: int = 0
    version: int = 0  # of its next end, to tell outdated events
    is_leaving: bool = False

    def advance(self, now_s: float) -> None:
        self.served += self.rate * (now_s - self.updated_s)
        self.updated_s = now_s


class ScalingPool:
    """A pool's size: the cluster's own policy, with Serve's bounds and delays around it."""

    def __init__(self, bounds: Autoscaling, start_s: float) -> None:
        self._bounds, self._start_s = bounds, start_s
        self._policy = LoadPolicy()
        self.target = self.running = bounds.min_replicas
        self._ready_at_s: deque[float] = deque()  # of those that start, in order
        self._wanted_since_s: float | None = None
        self._direction = 0

    def tick(self, now_s: float, loads: Sequence[float]) -> None:
        """Takes the loads of the running replicas, and starts or ends some."""
        while self._ready_at_s and self._ready_at_s[0] <= now_s:
            self._ready_at_s.popleft()
            self.running += 1
        context = SimpleNamespace(
            target_num_replicas=self.target,
            running_replicas=list(range(self.running)),
            aggregated_metrics={LOAD: dict(enumerate([*loads, *[0.0] * (self.running - len(loads))]))},
        )
        bounds = self._bounds
        wanted = min(max(self._policy(context)[0], bounds.min_replicas), bounds.max_replicas)
        direction = (wanted > self.target) - (wanted < self.target)
        if direction != self._direction:
            self._direction, self._wanted_since_s = direction, now_s
        delay_s = bounds.upscale_delay_s if direction > 0 else bounds.downscale_delay_s
        if direction and self._wanted_since_s is not None and now_s - self._wanted_since_s >= delay_s:
            self._resize(now_s, wanted)
            self._direction = 0

    def _resize(self, now_s: float, wanted: int) -> None:
        for _ in range(wanted - self.target):
            self._ready_at_s.append(now_s + self._start_s)
        for _ in range(self.target - wanted):
            if self._ready_at_s:
                self._ready_at_s.pop()
            else:
                self.running -= 1
        self.target = wanted


# ------------------------------------------------------------------ the simulation


class Simulator:
    """One run over one trace. `run` returns the report."""

    def __init__(self, config: ClusterConfig, costs: Costs) -> None:
        self._engine, self._costs = config.primary.engine, costs
        self._kv_cache_tokens = config.primary.engine.kv_cache_tokens or math.inf  # vLLM may find out by itself
        self._primary_targets = config.primary.autoscaling or _fixed(PrimaryAutoscaling, config.primary.num_replicas)
        self._drafter_targets = config.drafter.autoscaling or _fixed(DrafterAutoscaling, config.drafter.num_replicas)
        self._primary_pool = ScalingPool(self._primary_targets, costs.start_s)
        self._drafter_pool = ScalingPool(self._drafter_targets, costs.start_s)
        self._primaries: dict[str, _Primary] = {}
        self._pairing = Pool()
        self._names = (f"p{number}" for number in itertools.count())
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, str, Any]] = []
        self._num_running = 0
        self._first_token_s: list[float] = []
        self._token_s: list[float] = []
        self._num_refused = 0
        self._series: list[dict[str, float]] = []
        self._replica_s = {"primary": 0.0, "drafter": 0.0}

    def run(self, trace: Iterable[Arrival]) -> dict[str, Any]:
        for arrival in trace:
            self._schedule(arrival.at_s, "arrival", arrival)
        num_left = len(self._events)
        self._follow_pool(0.0)
        self._schedule(0.0, "tick", None)
        while self._events and (num_left or self._num_running or self._num_waiting()):
            now_s, _, kind, what = heapq.heappop(self._events)
            if kind == "arrival":
                num_left -= 1
                self._arrive(now_s, what)
            elif kind == "end":
                self._end(now_s, *what)
            else:
                self._tick(now_s)
        return self._report()

    def _schedule(self, at_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), kind, what))

    def _num_waiting(self) -> int:
        return sum(len(primary.waiting) for primary in self._primaries.values())

    # -------------------------------------------------------------- requests

    def _arrive(self, now_s: float, arrival: Arrival) -> None:
        name = self._pairing.pick()
        primary = self._primaries[name] if name is not None else None
        if primary is None or len(primary.waiting) >= self._engine.max_num_waiting:
            self._num_refused += 1
            return
        self._pairing.start(primary.name)
        primary.waiting.append(arrival)
        self._admit(now_s, primary)

    def _admit(self, now_s: float, primary: _Primary) -> None:
        """Lets in what there is room for, and works out when the next sequence ends."""
        primary.advance(now_s)
        while primary.waiting and len(primary.running) < self._engine.max_num_seqs:
            arrival = primary.waiting[0]
            need = arrival.prompt_tokens + arrival.output_tokens
            if primary.reserved_tokens and primary.reserved_tokens + need > self._kv_cache_tokens:
                break
            primary.waiting.popleft()
            primary.reserved_tokens += need
            self._num_running += 1
            self._set_rate(primary, len(primary.running) + 1)
            prefill_s = arrival.prompt_tokens * self._costs.prefill_token_s
            self._first_token_s.append(now_s - arrival.at_s + prefill_s)
            ends_at = primary.served + arrival.output_tokens + prefill_s * primary.rate
            heapq.heappush(primary.running, (ends_at, next(self._numbers), arrival))
        self._set_rate(primary, len(primary.running))
        primary.version += 1
        if primary.running:
            left = max(primary.running[0][0] - primary.served, 0.0)
            self._schedule(now_s + left / primary.rate, "end", (primary, primary.version))

    def _set_rate(self, primary: _Primary, num_sequences: int) -> None:
        costs = self._costs
        if self._drafter_pool.running and costs.block_length:
            draft_s = costs.draft_s(self._num_running / self._drafter_pool.running)
            primary.rate = (1 + costs.accepted_drafts) / (costs.step_s(num_sequences) + draft_s + costs.round_trip_s)
        else:
            primary.rate = 1 / (costs.step_fixed_s + costs.step_token_s * num_sequences)

    def _end(self, now_s: float, primary: _Primary, version: int) -> None:
        if version != primary.version:
            return
        primary.advance(now_s)
        _, _, arrival = heapq.heappop(primary.running)
        primary.reserved_tokens -= arrival.prompt_tokens + arrival.output_tokens
        self._num_running -= 1
        self._token_s.append((now_s - arrival.at_s) / arrival.output_tokens)
        self._pairing.end(primary.name)
        self._admit(now_s, primary)
        if primary.is_leaving and not primary.running and not primary.waiting:
            del self._primaries[primary.name]

    # -------------------------------------------------------------- pools

    def _tick(self, now_s: float) -> None:
        serving = [primary for primary in self._primaries.values() if not primary.is_leaving]
        loads = [primary_load(self._primary_signals(primary), self._primary_targets) for primary in serving]
        self._primary_pool.tick(now_s, loads)
        if drafters := self._drafter_pool.running:
            load = drafter_load(self._drafter_signals(), self._drafter_targets)
            self._drafter_pool.tick(now_s, [load] * drafters)
        self._follow_pool(now_s)
        for primary in self._primaries.values():
            self._admit(now_s, primary)  # the drafters' load, and so every rate, has changed
        sizes = {"primaries": self._primary_pool.running, "drafters": self._drafter_pool.running}
        self._replica_s["primary"] += sizes["primaries"] * TICK_S
        self._replica_s["drafter"] += sizes["drafters"] * TICK_S
        self._series.append({"at_s": now_s, "running": self._num_running, "waiting": self._num_waiting(), **sizes})
        self._schedule(now_s + TICK_S, "tick", None)

    def _follow_pool(self, now_s: float) -> None:
        """Makes the primaries as many as their pool has. One that leaves ends what it has; its queue moves on."""
        serving = [primary for primary in self._primaries.values() if not primary.is_leaving]
        for _ in range(self._primary_pool.running - len(serving)):
            new = _Primary(next(self._names), updated_s=now_s)
            self._primaries[new.name] = new
        num_leaving = max(len(serving) - self._primary_pool.running, 0)
        leaving = sorted(serving, key=lambda primary: len(primary.running))[:num_leaving]
        for primary in leaving:
            primary.is_leaving = True
            if not primary.running and not primary.waiting:
                del self._primaries[primary.name]
        self._pairing.set_members(name for name, primary in self._primaries.items() if not primary.is_leaving)
        for primary in leaving:
            moving, primary.waiting = primary.waiting, deque()
            for arrival in moving:
                self._pairing.end(primary.name)
                self._arrive(now_s, arrival)

    def _primary_signals(self, primary: _Primary) -> PrimarySignals:
        num_running = len(primary.running)
        return PrimarySignals(
            batch_occupancy=num_running / self._engine.max_num_seqs,
            kv_cache_usage=min(primary.reserved_tokens / self._kv_cache_tokens, 1.0),
            num_waiting_tokens=sum(arrival.prompt_tokens for arrival in primary.waiting),
            mean_step_s=self._costs.step_s(num_running) if num_running else None,
        )

    def _drafter_signals(self) -> DrafterSignals:
        """Of each drafter: they share evenly."""
        if not self._num_running:
            return DrafterSignals(0.0, 0.0, None)
        mine = self._num_running / self._drafter_pool.running
        draft_s = self._costs.draft_s(mine)
        batch = self._num_running / max(len(self._primaries), 1)
        round_s = self._costs.step_s(int(batch)) + draft_s + self._costs.round_trip_s
        return DrafterSignals(busy=min(mine, 1) * draft_s / round_s, kv_cache_usage=0.0, mean_wait_s=draft_s)

    def _report(self) -> dict[str, Any]:
        return {
            "completed": len(self._token_s),
            "refused": self._num_refused,
            "first_token_s": percentiles(self._first_token_s),
            "seconds_per_token": percentiles(self._token_s),
            "replica_seconds": self._replica_s,
            "costs": self._costs.model_dump(),
            "series": self._series,
        }


def simulate(config: ClusterConfig, costs: Costs, trace: Sequence[Arrival]) -> dict[str, Any]:
    """The report of one run; the same for the same arguments."""
    return Simulator(config, costs).run(trace)


def _fixed(kind: Any, num_replicas: int) -> Any:
    count = max(num_replicas, 1)
    return kind(min_replicas=count, max_replicas=count)
