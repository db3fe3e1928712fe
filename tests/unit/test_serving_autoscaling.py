"""How many replicas: loads from signals, counts from loads, and a policy that holds still rather than guess."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tandem_serve.config import DrafterAutoscaling, PrimaryAutoscaling
from tandem_serve.serving.autoscaling import (
    LOAD,
    DrafterSignals,
    LoadPolicy,
    PrimarySignals,
    Totals,
    drafter_load,
    primary_load,
    wanted_replicas,
)

PRIMARY = PrimaryAutoscaling(max_replicas=8, target_occupancy=0.5, target_waiting_tokens=1000, target_step_time_s=0.1)
DRAFTER = DrafterAutoscaling(max_replicas=8, target_occupancy=0.5, target_draft_wait_s=0.01)


@pytest.mark.parametrize(
    ("signals", "load"),
    [
        (PrimarySignals(0.0, 0.0, 0, None), 0.0),
        (PrimarySignals(0.5, 0.1, 0, 0.02), 1.0),  # the batch
        (PrimarySignals(0.1, 0.75, 0, 0.02), 1.5),  # the KV cache
        (PrimarySignals(1.0, 0.2, 3000, 0.02), 4.0),  # a queue, and what runs
        (PrimarySignals(0.1, 0.1, 0, 0.3), 3.0),  # slow steps
    ],
)
def test_a_primary_s_load_is_that_of_its_most_strained_resource(signals: PrimarySignals, load: float) -> None:
    assert primary_load(signals, PRIMARY) == pytest.approx(load)


@pytest.mark.parametrize(
    ("signals", "load"),
    [
        (DrafterSignals(0.0, 0.0, None), 0.0),
        (DrafterSignals(0.5, 0.1, 0.001), 1.0),  # its time
        (DrafterSignals(0.1, 1.0, 0.001), 2.0),  # its memory
        (DrafterSignals(0.9, 0.1, 0.03), 3.0),  # blocks come late
        (DrafterSignals(0.01, 0.0, 0.5), 0.08),  # one block came late; it has hardly anything to do
    ],
)
def test_a_drafter_s_load_is_its_own(signals: DrafterSignals, load: float) -> None:
    assert drafter_load(signals, DRAFTER) == pytest.approx(load)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([0.0], 1),
        ([1.05], 1),  # within the slack
        ([1.2], 2),
        ([4.3], 5),  # a long queue is met at once
        ([2.0, 0.0], 2),  # the second one is new: no third
        ([0.55, 0.4], 2),  # one would be too full
        ([0.4, 0.4], 1),
        ([0.0, 0.0, 0.0, 0.0], 1),
        ([1.5, 1.5], 3),
        ([0.9] * 1000, 1000),
        ([1.2] * 1000, 1200),
    ],
)
def test_the_count_follows_the_loads_with_slack(loads: list[float], wanted: int) -> None:
    assert wanted_replicas(loads, len(loads)) == wanted


def test_a_count_that_was_reached_is_kept_at_the_same_work() -> None:
    """No load, shared evenly, makes a pool go up and down by turns."""
    for hundredths in range(1, 2000):
        total = hundredths / 100
        count = wanted_replicas([total], 1)
        assert wanted_replicas([total / count] * count, count) == count, total


def context(loads: Any, *, target: int, running: int | None = None) -> SimpleNamespace:
    running = target if running is None else running
    return SimpleNamespace(
        target_num_replicas=target, running_replicas=list(range(running)), aggregated_metrics={LOAD: loads}
    )


@pytest.mark.parametrize(
    ("ctx", "wanted"),
    [
        (context({0: 2.5}, target=1), 3),
        (context({0: 0.1, 1: 0.1}, target=2), 1),
        (context({}, target=3), 3),  # nothing is known
        (context({0: 9.0}, target=2), 2),  # one has not reported
        (context({0: float("nan"), 1: 0.0}, target=2), 2),
        (context({0: 9.0}, target=2, running=1), 2),  # the second is still to come
        (context({0: 0.1}, target=2, running=1), 1),  # and is no longer needed
        (context({}, target=2, running=0), 2),
    ],
)
def test_the_policy_holds_where_it_does_not_know(ctx: SimpleNamespace, wanted: int) -> None:
    assert LoadPolicy()(ctx)[0] == wanted


def test_the_policy_never_raises() -> None:
    class Broken:
        target_num_replicas = 4

        @property
        def running_replicas(self) -> list[int]:
            raise RuntimeError("a new version of Serve")

    assert LoadPolicy()(Broken()) == (4, {})
    assert LoadPolicy()(None)[0] == 1


def test_means_are_of_what_happened_in_between() -> None:
    totals = Totals()
    assert totals.since(3.0, 2) == (3.0, 2)
    assert totals.since(3.0, 2) == (0.0, 0)
    assert totals.since(5.0, 3) == (2.0, 1)
