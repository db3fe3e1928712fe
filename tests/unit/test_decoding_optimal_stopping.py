"""Optimal stopping: costs are learnt, thresholds follow them, and drafting ends where the primary alone is faster."""

from __future__ import annotations

import random

import pytest

from tandem_serve.decoding.block_policy import BlockPlan, Round, StepSize
from tandem_serve.decoding.optimal_stopping import (
    FIRST_LENGTH,
    FIRST_LOOKS,
    LOOK_TURNS,
    MIN_TURNS,
    PROBE_TURNS,
    REST_TURNS,
    OptimalStopping,
)
from tandem_serve.types import PolicyName, SamplingParams, StoppingRule
from tests.engines import a_request, step_of

SAMPLED = SamplingParams(temperature=0.8)
STEP_S, SEQUENCE_S, DRAFTING_S = 0.003, 0.001, 0.0002  # a step, each sequence in it, and asking for drafts at all


class Simulation:
    """Rounds of a batch: each draft is right with chance `right`."""

    def __init__(self, right: float, making_s: float, verify_s: float, *, step_s: float = 0.0, batch: int = 1) -> None:
        self.policy = OptimalStopping()
        self.right, self.making_s, self.verify_s, self.step_s = right, making_s, verify_s, step_s
        self.requests = [a_request(str(i)) for i in range(batch)]
        self._random = random.Random(0)

    def turn(self, *, num_others: int = 0) -> list[BlockPlan]:
        """One round of all, beside others without drafts, of which the policy hears nothing."""
        num_running = len(self.requests) + num_others
        plans = [self.policy.plan(request, 16, num_running) for request in self.requests]
        lengths = [min(plan.block_length, self._random.randint(1, 8)) for plan in plans]  # what scores make of it
        size = step_of(*lengths, *[0] * num_others)
        drafting = DRAFTING_S + self.step_s * max(lengths) + self.making_s * sum(lengths)
        verifying = STEP_S + SEQUENCE_S * num_running + self.verify_s * sum(lengths)
        for request, length in zip(self.requests, lengths, strict=True):
            accepted = next((i for i in range(length) if self._random.random() > self.right), length)
            if length:
                outcome = Round(length, accepted, size, drafting, drafting + verifying)
                self.policy.observe_round(request, outcome)
        self.policy.observe_step(size, verifying)
        return plans

    def run(self, num_turns: int, *, num_others: int = 0) -> list[BlockPlan]:
        return [plan for _ in range(num_turns) for plan in self.turn(num_others=num_others)]


def rule_of(plan: BlockPlan) -> tuple[float, float, float]:
    """Threshold, keep threshold, step cost."""
    rule = plan.stopping
    assert rule is not None and rule.threshold is not None
    return rule.threshold, rule.keep_threshold, rule.step_cost


def test_at_first_the_drafter_s_own_threshold_holds() -> None:
    plans = Simulation(0.8, 0.0003, 0.0002).run(MIN_TURNS)
    assert plans == [BlockPlan(FIRST_LENGTH, StoppingRule(PolicyName.OPTIMAL))] * MIN_TURNS


def test_dear_drafts_end_blocks_earlier() -> None:
    cheap, dear = (rule_of(Simulation(0.8, making_s, 0.0002).run(200)[-1]) for making_s in (0.0002, 0.001))
    assert 0 < cheap[0] < dear[0] < 1
    assert 0 < cheap[1] < cheap[0]


@pytest.mark.parametrize("batch", [1, 4])
def test_thresholds_are_times_in_tokens(batch: int) -> None:
    simulation = Simulation(0.8, 0.0001, 0.0002, step_s=0.0004, batch=batch)
    simulation.run(400)
    threshold, keep, step_cost = rule_of(simulation.policy.plan(simulation.requests[0], 16, batch))
    load = simulation.policy._load
    assert load is not None
    kind = load.of(simulation.requests[0])
    rate, acceptance = kind.rate(batch), kind.past.accepted / (kind.past.accepted + kind.past.rejected)
    # With one sequence a step and a draft are the same thing: the sum of what they cost counts.
    whole = rate * (0.0004 + batch * (0.0001 + 0.0002)) / acceptance
    assert threshold + step_cost == pytest.approx(whole, rel=0.15)
    assert keep == pytest.approx(batch * rate * 0.0002, rel=0.15)
    if batch > 1:
        assert step_cost == pytest.approx(rate * 0.0004 / acceptance, rel=0.3)


def test_a_batch_that_shrinks_is_learnt_anew() -> None:
    simulation = Simulation(0.8, 0.0001, 0.0002, step_s=0.0004, batch=8)
    of_eight = simulation.run(100)[-1].stopping
    simulation.requests = simulation.requests[:2]
    first, *_, later = simulation.run(30)
    assert first.stopping == StoppingRule(PolicyName.OPTIMAL)
    of_two = later.stopping
    assert of_two is not None and of_eight is not None and of_two.keep_threshold < of_eight.keep_threshold


def test_where_drafts_do_not_pay_there_are_a_few_and_they_come_back() -> None:
    simulation = Simulation(0.05, 0.002, 0.002)
    simulation.run(100)
    resting = simulation.run(2 * REST_TURNS)
    assert sum(plan.block_length > 0 for plan in resting) == 2 * PROBE_TURNS
    simulation.right, simulation.making_s, simulation.verify_s = 0.95, 0.0001, 0.0001
    simulation.run(20 * REST_TURNS)
    assert sum(plan.block_length == 0 for plan in simulation.run(50)) <= 1  # a look


@pytest.mark.parametrize(("batch", "num_others"), [(1, 0), (3, 0), (8, 0), (3, 4)])
def test_all_of_a_batch_rest_and_probe_together(batch: int, num_others: int) -> None:
    simulation = Simulation(0.05, 0.002, 0.002, batch=batch)
    simulation.run(100, num_others=num_others)
    turns = [{plan.block_length > 0 for plan in simulation.turn(num_others=num_others)} for _ in range(128)]
    assert turns.count({True}) == 2 * PROBE_TURNS and turns.count({False}) == 128 - 2 * PROBE_TURNS


@pytest.mark.parametrize(("batch", "num_others"), [(1, 0), (3, 0), (8, 0), (3, 4)])
def test_where_drafts_pay_all_look_together_at_a_round_without(batch: int, num_others: int) -> None:
    simulation = Simulation(0.95, 0.0001, 0.0001, batch=batch)
    turns = [{plan.block_length > 0 for plan in simulation.turn(num_others=num_others)} for _ in range(3 * LOOK_TURNS)]
    first = 2 * MIN_TURNS
    looks = [*range(first, first + FIRST_LOOKS), first + LOOK_TURNS, first + 2 * LOOK_TURNS]
    assert [turn for turn, drafts in enumerate(turns) if drafts == {False}] == looks
    assert all(drafts == {True} for turn, drafts in enumerate(turns) if turn not in looks)


def test_beside_others_that_always_draft_there_is_no_judging_but_drafts_go_on() -> None:
    """Their drafts are in the step of a look as well: it tells nothing."""
    policy, requests = OptimalStopping(), [a_request("a"), a_request("b", sampling=SAMPLED)]
    drafted = 0
    for _ in range(1000):
        plans = [policy.plan(request, 16, 4) for request in requests]
        lengths = [min(plan.block_length, 4) for plan in plans]
        size = step_of(*lengths, 5, 5)
        for request, length in zip(requests, lengths, strict=True):
            if length:
                policy.observe_round(request, Round(length, length - 1, size, 0.004, 0.014))
        policy.observe_step(size, 0.01)
        drafted += all(lengths)
    assert drafted > 990


def test_steps_of_others_alone_say_nothing() -> None:
    simulation = Simulation(0.8, 0.0003, 0.0002)
    simulation.run(100)
    before = rule_of(simulation.turn()[0])
    for _ in range(500):
        simulation.policy.observe_step(step_of(*[0] * 64), 0.07)
        simulation.policy.observe_step(step_of(*[5] * 64), 0.09)
    assert rule_of(simulation.turn()[0]) == pytest.approx(before, rel=0.03)


def test_one_slow_look_does_not_decide_for_long() -> None:
    simulation = Simulation(0.05, 0.002, 0.002)
    simulation.run(2 * MIN_TURNS)
    simulation.policy.plan(simulation.requests[0], 16, 1)
    simulation.policy.observe_step(step_of(0), 0.5)  # where 4 ms are usual
    plans = simulation.run(REST_TURNS)
    assert sum(plan.block_length == 0 for plan in plans) > REST_TURNS / 2


def test_a_lone_sequence_is_judged_by_one_threshold() -> None:
    plan = Simulation(0.8, 0.0001, 0.0002, step_s=0.0004).run(100)[-1]
    assert rule_of(plan)[2] == 0


def test_one_look_tells_how_fast_the_primary_alone_is() -> None:
    """A second row may take much longer than a third: the line through steps with drafts says nothing of none."""
    simulation = Simulation(0.8, 0.0008, 0.0001, batch=2)
    turns: list[int] = []
    for _ in range(100):
        plans = [simulation.policy.plan(request, 16, 2) for request in simulation.requests]
        if not any(plan.block_length for plan in plans):
            turns.append(0)
            simulation.policy.observe_step(step_of(0, 0), 0.002)
        else:
            turns.append(1)
            drafting, verifying = 0.0008 * 4, 0.008
            for request in simulation.requests:
                outcome = Round(4, 3, step_of(4, 4), drafting, drafting + verifying)
                simulation.policy.observe_round(request, outcome)
            simulation.policy.observe_step(step_of(4, 4), verifying)
    # Four tokens in 11.2 ms are less than four times one in 2 ms.
    assert turns[: 2 * MIN_TURNS + 1] == [1] * 2 * MIN_TURNS + [0]
    assert sum(turns[2 * MIN_TURNS + 8 :]) <= 2 * PROBE_TURNS + 8


def test_what_the_first_rounds_have_shown_does_not_hold_for_long() -> None:
    simulation = Simulation(0.05, 0.0005, 0.0005)
    first = simulation.run(2 * MIN_TURNS + 4)
    assert first[-1].block_length == 0
    simulation.right = 0.95
    later = simulation.run(60)
    assert all(plan.block_length > 0 for plan in later[-8:])


def test_classes_do_not_sway_each_other() -> None:
    simulation = Simulation(0.05, 0.002, 0.002)
    simulation.run(100)
    assert simulation.policy.plan(a_request(sampling=SAMPLED), 16, 1).stopping == StoppingRule(PolicyName.OPTIMAL)


def test_steps_with_prompts_say_nothing_of_costs() -> None:
    simulation = Simulation(0.8, 0.0003, 0.0002)
    simulation.run(100)
    before = simulation.policy.plan(simulation.requests[0], 16, 1)
    size = StepSize(4, 2, 200, has_prompts=True)
    simulation.policy.observe_round(simulation.requests[0], Round(4, 3, size, 0.001, 0.5))
    simulation.policy.observe_step(size, 0.4)
    assert rule_of(simulation.policy.plan(simulation.requests[0], 16, 1)) == pytest.approx(rule_of(before), rel=0.03)
