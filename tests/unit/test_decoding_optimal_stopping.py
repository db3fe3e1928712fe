"""Optimal stopping: costs are learnt, thresholds follow them, and drafting ends where the primary alone is faster."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_serve.decoding.block_policy import BlockPlan, Round, StepSize
from tandem_serve.decoding.optimal_stopping import (
    FIRST_LENGTH,
    MIN_ROUNDS,
    PROBE_ROUNDS,
    REST_ROUNDS,
    LinearCost,
    OptimalStopping,
)
from tandem_serve.types import PolicyName, SamplingParams, StoppingRule
from tests.engines import a_request

SAMPLED = SamplingParams(temperature=0.8)


@given(st.floats(0, 0.1), st.floats(0, 0.01), st.floats(0, 0.1), st.floats(0.001, 0.01))
def test_costs_are_learnt_and_learnt_anew(a: float, b: float, later_a: float, later_b: float) -> None:
    cost = LinearCost()
    for first, slope, rounds in ((a, b, 50), (later_a, later_b, 600)):
        for i in range(rounds):
            cost.add(1 + i % 7, first + slope * (1 + i % 7))
    assert cost.slope == pytest.approx(later_b, rel=0.05, abs=1e-5)
    assert cost.at(4) == pytest.approx(later_a + 4 * later_b, rel=0.05)


def test_a_pause_of_the_machine_is_no_cost() -> None:
    cost = LinearCost()
    for i in range(60):
        cost.add(1 + i % 5, 0.01 * (1 + i % 5))
    cost.add(3, 10.0)
    assert cost.at(3) == pytest.approx(0.03, rel=0.1)


class Simulation:
    """Rounds of one sequence: each draft is right with chance `right`."""

    def __init__(
        self, right: float, draft_s: float, verify_s: float, *, sampling: SamplingParams | None = None
    ) -> None:
        self.policy = OptimalStopping()
        self.request = a_request() if sampling is None else a_request(sampling=sampling)
        self.right, self.draft_s, self.verify_s = right, draft_s, verify_s
        self._random = random.Random(0)

    def run(self, num_rounds: int) -> list[BlockPlan]:
        plans = []
        for _ in range(num_rounds):
            plan = self.policy.plan(self.request, 16, 1)
            plans.append(plan)
            length = min(plan.block_length, self._random.randint(1, 8))  # what a drafter's scores make of it
            accepted = next((i for i in range(length) if self._random.random() > self.right), length)
            drafting, verifying = self.draft_s * length, 0.004 + self.verify_s * (length + 1)
            self.policy.observe_step(length + 1, verifying)
            if length:
                size = StepSize(length, length + 1, has_prompts=False)
                self.policy.observe_round(self.request, Round(length, accepted, size, drafting, drafting + verifying))
        return plans


def threshold(plan: BlockPlan) -> float:
    assert plan.stopping is not None and plan.stopping.threshold is not None
    return plan.stopping.threshold


def test_at_first_the_drafter_s_own_threshold_holds() -> None:
    plans = Simulation(0.8, 0.0003, 0.0002).run(MIN_ROUNDS)
    assert plans == [BlockPlan(FIRST_LENGTH, StoppingRule(PolicyName.OPTIMAL))] * MIN_ROUNDS


def test_dear_drafts_end_blocks_earlier() -> None:
    cheap, dear = (Simulation(0.8, draft_s, 0.0002).run(200)[-1] for draft_s in (0.0002, 0.001))
    assert 0 < threshold(cheap) < threshold(dear) < 1
    assert cheap.stopping is not None and dear.stopping is not None
    assert 0 < cheap.stopping.keep_threshold < threshold(cheap)


def test_the_threshold_is_the_time_of_one_draft_in_tokens() -> None:
    simulation = Simulation(0.8, 0.0004, 0.0002)
    simulation.run(400)
    plan = simulation.policy.plan(simulation.request, 16, 1)
    kind = simulation.policy._class_of(simulation.request)
    assert threshold(plan) == pytest.approx(kind.rate * (0.0004 + 0.0002) / kind.acceptance, rel=0.1)
    assert plan.stopping is not None and plan.stopping.keep_threshold == pytest.approx(kind.rate * 0.0002, rel=0.1)


def test_verification_weighs_more_in_a_batch() -> None:
    simulation = Simulation(0.8, 0.0003, 0.0002)
    simulation.run(200)
    alone, among_eight = (simulation.policy.plan(simulation.request, 16, n) for n in (1, 8))
    assert threshold(alone) < threshold(among_eight)


def test_where_drafts_do_not_pay_there_are_a_few_and_they_come_back() -> None:
    simulation = Simulation(0.05, 0.002, 0.002)
    simulation.run(100)
    resting = simulation.run(2 * REST_ROUNDS)
    assert sum(plan.block_length > 0 for plan in resting) == 2 * PROBE_ROUNDS
    simulation.right, simulation.draft_s, simulation.verify_s = 0.95, 0.0001, 0.0001
    simulation.run(20 * REST_ROUNDS)
    assert all(plan.block_length > 0 for plan in simulation.run(50))


def test_what_the_first_rounds_have_shown_does_not_hold_for_long() -> None:
    simulation = Simulation(0.05, 0.0005, 0.0005)
    first = simulation.run(2 * MIN_ROUNDS + 4)
    assert first[-1].block_length == 0
    simulation.right = 0.95
    later = simulation.run(40)
    assert all(plan.block_length > 0 for plan in later[-8:])


def test_classes_do_not_sway_each_other() -> None:
    simulation = Simulation(0.05, 0.002, 0.002)
    simulation.run(100)
    assert simulation.policy.plan(a_request(sampling=SAMPLED), 16, 1).stopping == StoppingRule(PolicyName.OPTIMAL)


def test_the_last_sequence_of_a_batch_does_not_rest_because_its_rate_was_that_of_many() -> None:
    policy, request = OptimalStopping(), a_request()
    for turn in range(10 * MIN_ROUNDS):
        assert all(policy.plan(request, 16, 8).block_length for _ in range(8))
        length = 3 + turn % 3  # all but one of them right
        verifying = 0.004 + 0.0004 * 8 * (1 + length)
        policy.observe_step(8 * (1 + length), verifying)
        for _ in range(8):
            size = StepSize(length, 8 * (1 + length), has_prompts=False)
            policy.observe_round(request, Round(length, length - 1, size, 0.002, 0.002 + verifying))
    assert policy.plan(request, 16, 1).block_length
