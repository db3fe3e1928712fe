"""Costs over sizes: learnt, learnt anew, and sensible where sizes have told nothing apart."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandem_serve.decoding.linear_cost import LinearCost


@given(st.floats(0, 0.1), st.floats(0, 0.01), st.floats(0, 0.1), st.floats(0.001, 0.01))
@example(1e-5, 0, 0.1, 0.001)
@example(0, 1e-5, 0, 0.01)
def test_costs_are_learnt_and_learnt_anew(a: float, b: float, later_a: float, later_b: float) -> None:
    cost = LinearCost(1, decay=0.98)
    for first, slope, rounds in ((a, b, 50), (later_a, later_b, 600)):
        for i in range(rounds):
            cost.add((1 + i % 7,), first + slope * (1 + i % 7))
    assert cost.slopes[0] == pytest.approx(later_b, rel=0.1, abs=3e-5 + 0.01 * later_a)
    assert cost.at((4,)) == pytest.approx(later_a + 4 * later_b, rel=0.05)


def test_sizes_that_vary_apart_are_told_apart() -> None:
    rng, cost = random.Random(0), LinearCost(3, decay=0.99)
    for _ in range(400):
        sequences, steps = rng.randint(1, 8), rng.randint(1, 8)
        drafts = sum(rng.randint(1, steps) for _ in range(sequences))
        cost.add((sequences, steps, drafts), 2 + 0.3 * sequences + 0.6 * steps + 0.1 * drafts + rng.gauss(0, 0.05))
    assert cost.slopes == pytest.approx([0.3, 0.6, 0.1], abs=0.05)
    assert cost.at((8, 5, 40)) == pytest.approx(2 + 2.4 + 3 + 4, rel=0.03)


def test_sizes_that_only_vary_together_share_what_they_cost() -> None:
    cost = LinearCost(2, decay=0.99)
    for i in range(100):
        cost.add((1 + i % 5, 1 + i % 5), 0.5 + 0.8 * (1 + i % 5))
    assert cost.slopes == pytest.approx([0.4, 0.4], rel=0.05)


def test_a_size_that_has_not_varied_makes_up_half_of_the_cost() -> None:
    cost = LinearCost(1, decay=0.99)
    for _ in range(20):
        cost.add((8,), 16.0)
    assert cost.slopes == pytest.approx([1.0])
    assert cost.at((4,)) == pytest.approx(12.0)


def test_nothing_gets_faster_by_a_size() -> None:
    rng, cost = random.Random(0), LinearCost(2, decay=0.99)
    for _ in range(200):
        x, y = rng.randint(1, 9), rng.randint(1, 9)
        cost.add((x, y), 30 - 2 * x + y)
    assert cost.slopes[0] == 0 and cost.slopes[1] == pytest.approx(1, rel=0.4)


def test_a_pause_of_the_machine_is_no_cost_unless_it_comes_twice_in_a_row() -> None:
    cost = LinearCost(0, decay=0.8)
    for seconds in (0.01, 0.01, 10.0, 0.01, 10.0, 0.01):
        cost.add((), seconds)
    assert cost.mean < 0.013
    for _ in range(20):
        cost.add((), 10.0)
    assert cost.mean > 9


def test_what_fades_weighs_less_than_what_comes() -> None:
    cost = LinearCost(0, decay=1.0, largest_surprise=9.0)
    for _ in range(10):
        cost.add((), 1.0)
    cost.fade(0.1)
    cost.add((), 2.0)
    assert cost.mean == pytest.approx(1.5)


def test_what_is_unknown_is_nothing() -> None:
    cost = LinearCost(2, decay=0.99)
    assert not cost.is_known and cost.mean == 0 and cost.at((3, 4)) == 0 and cost.slopes == [0, 0]


def test_slopes_are_not_swayed_by_a_machine_that_is_now_faster_now_slower() -> None:
    """Sizes rise and fall with the machine's speed, over some 50 samples: by chance, and for no more than a while."""
    rng, cost = random.Random(1), LinearCost(1, decay=0.99)
    for i in range(300):
        tide = math.sin(i / 25)
        size = 20 + 4 * tide + rng.gauss(0, 4)
        cost.add((size,), 15 - 3 * tide + 0.3 * size)
    assert cost.slopes[0] == pytest.approx(0.3, abs=0.05)
