"""How many replicas each pool should have: signals to a load, loads to a count. No Ray in here, and no clocks.

A replica turns its own signals into one number, its *load*: 1.0 is exactly what the cluster file wants it to carry, 2.0
is work for two. The policy, which Serve calls in its controller, adds the loads up. So every target lives where it can
be changed while things run (user_config), and the policy is the same for both pools. `tandem-serve simulate` uses the
same functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem_serve.config import DrafterAutoscaling, PrimaryAutoscaling

LOAD = "load"  # the key in record_autoscaling_stats
POLICY_PATH = "tandem_serve.serving.autoscaling:LoadPolicy"
SLACK = 0.1  # a pool neither grows nor shrinks while its mean load is within this of what it would be afterwards

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------ a replica's side


@dataclass(frozen=True, slots=True)
class PrimarySignals:
    """What a primary measured since the last report, or is at now."""

    batch_occupancy: float  # running / max_num_seqs
    kv_cache_usage: float  # share of the KV budget reserved, 0..1
    num_waiting_tokens: int  # prompt tokens in its queue
    mean_step_s: float | None  # None: it took no step


@dataclass(frozen=True, slots=True)
class DrafterSignals:
    """What a drafter measured since the last report, or is at now."""

    busy: float  # share of the time in which it worked, 0..1
    kv_cache_usage: float
    mean_wait_s: float | None  # from a request's arrival to its block; None: it drafted nothing


def primary_load(signals: PrimarySignals, targets: PrimaryAutoscaling) -> float:
    """The most strained of its resources, as a multiple of what it is to carry."""
    strains = [
        signals.batch_occupancy / targets.target_occupancy,
        signals.kv_cache_usage / targets.target_occupancy,
        # what waits comes on top of what runs
        signals.batch_occupancy + signals.num_waiting_tokens / targets.target_waiting_tokens,
    ]
    if targets.target_step_time_s is not None and signals.mean_step_s is not None:
        strains.append(signals.mean_step_s / targets.target_step_time_s)
    return max(strains)


def drafter_load(signals: DrafterSignals, targets: DrafterAutoscaling) -> float:
    """As primary_load. An idle drafter's wait says nothing: it counts as far as the drafter is busy."""
    strains = [signals.busy / targets.target_occupancy, signals.kv_cache_usage / targets.target_occupancy]
    if targets.target_draft_wait_s is not None and signals.mean_wait_s is not None:
        strains.append(min(signals.mean_wait_s / targets.target_draft_wait_s, 4 * strains[0]))
    return max(strains)


@dataclass(slots=True)
class Totals:
    """Sums that only grow (a histogram's), read at intervals: what happened since they were read last."""

    sum: float = 0.0
    count: float = 0.0

    def since(self, sum: float, count: float) -> tuple[float, float]:
        """The growth of both since the last call."""
        grown = sum - self.sum, count - self.count
        self.sum, self.count = sum, count
        return grown


# ------------------------------------------------------------------ the pool's side


def wanted_replicas(loads: Sequence[float], current: int) -> int:
    """How many replicas should share these loads, one a running replica. With hysteresis: see SLACK.

    A pool grows where it would still be more than full at its present size, and shrinks only to a size at which it
    would not have to grow again at once.
    """
    total = sum(loads)
    if total > current * (1 + SLACK):
        return math.ceil(total - SLACK)
    smaller = max(math.ceil(total / (1 - SLACK)), 1)
    return min(smaller, current)


class LoadPolicy:
    """Serve's autoscaling policy of primary and drafter pool. Serve adds bounds and delays.

    Never raises: a policy that does wedges its application. Holds the present count while any running replica has
    not reported (it is new, or its figures got lost), and never grows while replicas asked for are still to come.
    """

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        target = 1
        try:
            target = int(ctx.target_num_replicas)
            return self._decide(ctx, target), {}
        except Exception:
            logger.exception("the autoscaling policy failed; the pool stays as it is")
            return target, {}

    def _decide(self, ctx: Any, target: int) -> int:
        loads: Mapping[Any, float] = ctx.aggregated_metrics.get(LOAD, {})
        running = list(ctx.running_replicas)
        known = [loads[replica] for replica in running if replica in loads and math.isfinite(loads[replica])]
        if not running or len(known) < len(running):
            return target
        wanted = wanted_replicas(known, target)
        return wanted if len(running) >= target else min(wanted, target)
