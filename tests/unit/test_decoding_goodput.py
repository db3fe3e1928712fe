"""Block lengths from measured costs: checked against the best of all lengths on machines whose costs are known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tandem_serve.decoding.goodput import PROBE_ROUNDS, Acceptance, Curve, MeasuredBlockLength


def a_core(num_tokens: int) -> float:
    """Memory-bound up to 10 tokens, then compute-bound."""
    return 0.05 * max(1.0, num_tokens / 10)


def a_gpu(num_tokens: int) -> float:
    return 0.02 * max(1.0, num_tokens / 180)


def settle(
    policy: MeasuredBlockLength, batch: int, step_s: Callable[[int], float], draft_s: float, rate: float, rounds: int
) -> list[int]:
    """Runs rounds on a machine with these costs; every draft is right with probability `rate`. The lengths chosen."""
    chance = random.Random(1)
    lengths = []
    for _ in range(rounds):
        length = policy.block_length(None, batch)
        lengths.append(length)
        policy.observe_step(batch * (1 + length), step_s(batch * (1 + length)))
        if length:
            policy.observe_wait(length, draft_s * length)
            for _ in range(batch):
                accepted = 0
                while accepted < length and chance.random() < rate:
                    accepted += 1
                policy.observe_block(length, accepted)
    return lengths


def goodput(length: int, batch: int, step_s: Callable[[int], float], draft_s: float, rate: float) -> float:
    accepted = sum(rate**place for place in range(1, length + 1))
    return batch * (1 + accepted) / (step_s(batch * (1 + length)) + draft_s * length)


@pytest.mark.parametrize("machine", [a_core, a_gpu])
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 64])
@pytest.mark.parametrize(("draft_s", "rate"), [(0.001, 0.75), (0.004, 0.6), (0.2, 0.75), (0.001, 0.05)])
def test_the_choice_is_nearly_the_best_there_is(
    machine: Callable[[int], float], batch: int, draft_s: float, rate: float
) -> None:
    policy = MeasuredBlockLength(default=5, longest=8)
    chosen = settle(policy, batch, machine, draft_s, rate, 400)[-100:]
    rates = {length: goodput(length, batch, machine, draft_s, rate) for length in range(9)}
    mean = sum(rates[length] for length in chosen) / len(chosen)
    assert mean > 0.93 * max(rates.values()), (rates, chosen)
    assert mean > 0.97 * rates[0], "drafting never costs throughput"


def test_the_block_shrinks_with_the_batch_and_comes_back() -> None:
    policy = MeasuredBlockLength(default=5, longest=8)
    means = []
    for batch in (1, 4, 16, 1):
        lengths = settle(policy, batch, a_core, 0.001, 0.75, 200)[-50:]
        means.append(sum(lengths) / len(lengths))
    assert means[0] > 4 > means[1] > 0.9 > 0.1 > means[2]
    assert means[3] > 4


def test_while_nothing_is_drafted_a_probe_shows_when_that_has_changed() -> None:
    policy = MeasuredBlockLength(default=5)
    assert max(settle(policy, 1, a_gpu, 0.5, 0.7, 200)[-PROBE_ROUNDS:]) == 1
    assert settle(policy, 1, a_gpu, 0.001, 0.7, 2500)[-1] > 2


def test_requests_have_the_last_word_and_the_default_the_first() -> None:
    policy = MeasuredBlockLength(default=3)
    assert [policy.block_length(requested, 1) for requested in (None, 7, 0, 60)] == [3, 7, 0, 16]
    assert MeasuredBlockLength(default=0).block_length(None, 1) == 0
    fixed = MeasuredBlockLength(default=4, adapts=False)
    assert set(settle(fixed, 16, a_core, 0.2, 0.1, 50)) == {4}
    assert fixed.longest_wait_s(4, 16) == float("inf")


def test_drafts_are_waited_for_no_longer_than_they_are_worth() -> None:
    policy = MeasuredBlockLength()
    assert policy.longest_wait_s(5, 1) == float("inf"), "nothing is known"
    settle(policy, 1, a_core, 0.001, 0.75, 100)
    for _ in range(50):
        policy.observe_step(1, 0.05)
    expected = 0.05 * sum(0.75**place for place in range(1, 6))
    assert policy.longest_wait_s(5, 1) == pytest.approx(expected, rel=0.25)


def test_curves_interpolate_and_hope() -> None:
    curve = Curve(memory=6)
    assert curve(3) is None
    curve.observe(4, 1.0)
    assert [curve(size) for size in (2, 4, 9)] == [0.5, 1.0, 1.0]
    curve.observe(8, 2.0)
    assert [curve(size) for size in (5, 6)] == [1.25, 1.5]
    curve.observe(16, 2.0)
    assert curve(12) == 2.0
    for seconds in (9.0, 2.0, 2.0):
        curve.observe(8, seconds)
    assert curve(8) == 2.0, "the median does not mind a hiccup"
    assert curve(2) == 0.5
    curve.observe(8, 2.0)
    assert curve(4) == 1.0, "forgotten, and hoped for: half of 8's"
    assert curve(2) == 0.5


def test_acceptance_is_learnt_place_by_place() -> None:
    acceptance = Acceptance()
    for _ in range(300):
        acceptance.observe(3, 1)
    found = list(acceptance.expected(4))
    assert found[0] == 0
    assert found[1] == pytest.approx(1, abs=0.05)
    assert found[4] == pytest.approx(1, abs=0.1)
