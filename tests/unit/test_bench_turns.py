"""How benchmarks take turns, and how sure they are of a median."""

from __future__ import annotations

import random
from collections import Counter
from statistics import median

import pytest

from tandem_serve.bench.cluster import _places
from tandem_serve.bench.overhead import cost_of_watching
from tandem_serve.bench.summary import median_interval


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_every_mode_is_in_every_place_equally_often(names: list[str]) -> None:
    turns = [_places(names, turn) for turn in range(2 * len(names))]
    for place in range(len(names)):
        assert Counter(turn[place] for turn in turns) == dict.fromkeys(names, 2)


def test_the_cost_of_watching_is_what_lacks_against_the_mean_of_both_others() -> None:
    rates = {"bare": [100.0, 90.0, 100.0], "control": [100.0, 110.0, 0.0], "observed": [97.0, 98.0, 50.0]}
    assert cost_of_watching(rates)["median"] == pytest.approx(0.02)


def test_the_interval_of_a_median_holds_the_true_one_19_times_in_20() -> None:
    draw = random.Random(0).lognormvariate
    hits = 0
    for _ in range(400):
        low, high = median_interval(sample := sorted(draw(0, 1) for _ in range(100)))
        assert low <= median(sample) <= high
        hits += low <= 1 <= high
    assert 0.92 < hits / 400 < 0.98
    assert median_interval([]) == (0, 0)
    assert median_interval([3.0]) == (3, 3)
