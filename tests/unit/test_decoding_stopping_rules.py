"""When a block ends: scores, and rules that judge blocks alone or, where they share steps, together."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tandem_serve.decoding.sampling import Choice, SamplingRows, choose_token_ids
from tandem_serve.decoding.stopping_rules import (
    DEFAULT_THRESHOLDS,
    UNTRAINED,
    Stopping,
    TextOdds,
    entropy_score,
    own_probs,
)
from tandem_serve.training.calibration import area_under_curve
from tandem_serve.types import PolicyName, SamplingParams, StoppingRule

ADAPTIVE = [policy for policy in PolicyName if policy is not PolicyName.FIXED]


def test_entropy_score() -> None:
    certain = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    logits = torch.stack([certain, torch.zeros(4)])
    assert entropy_score(logits).tolist() == pytest.approx([1.0, 1 - math.sqrt(0.2 * math.log(4))])


def test_without_a_model_optimal_stopping_goes_by_the_draft_s_own_probability() -> None:
    logits = torch.tensor([[0.512, 0.488], [0.729, 0.271]]).log()
    assert UNTRAINED(PolicyName.OPTIMAL, logits, greedy(logits)) == pytest.approx([0.8, 0.9])
    assert UNTRAINED(PolicyName.ROUTER, logits, greedy(logits)) == entropy_score(logits).tolist()
    rows = SamplingRows.from_params([(SamplingParams(temperature=1.0, seed=3), position) for position in range(2)])
    sampled = choose_token_ids(logits, rows)
    assert UNTRAINED(PolicyName.OPTIMAL, logits, sampled) == own_probs(sampled).tolist()


def test_a_sampled_draft_is_as_clear_as_its_lead_over_the_next_noise_included() -> None:
    """Not as its probability: a rare token whose noise is far ahead is sure, since the primary adds the same noise."""
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    rows = SamplingRows.from_params([(SamplingParams(temperature=0.8, seed=7), position) for position in range(200)])
    choice = choose_token_ids(logits, rows)
    disturbed = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    stays = choose_token_ids(disturbed, rows).token_ids == choice.token_ids
    probs = logits.softmax(-1).gather(-1, choice.token_ids[:, None])[:, 0]
    by_lead, by_probability = (area_under_curve(score, stays) for score in (own_probs(choice), probs))
    assert by_lead is not None and by_probability is not None and by_lead > by_probability + 0.1


def greedy(logits: Tensor) -> Choice:
    return choose_token_ids(logits, SamplingRows.from_params([(SamplingParams(temperature=0), 0)] * len(logits)))


@given(
    rules=st.lists(
        st.one_of(
            st.none(),
            st.builds(
                StoppingRule,
                st.sampled_from(ADAPTIVE),
                st.one_of(st.none(), st.floats(0, 1)),
                st.floats(0, 1),
                st.sampled_from([0.0, 0.2]),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 99),
)
def test_blocks_that_share_no_steps_are_judged_alone(rules: list[StoppingRule | None], seed: int) -> None:
    logits = torch.randn(len(rules), 9, generator=torch.Generator().manual_seed(seed)) * 3
    together = Stopping(rules, DEFAULT_THRESHOLDS)
    assert bool(together) == any(rule is not None for rule in rules)
    goes_on = together.judge(range(len(rules)), [True] * len(rules), scores_by_policy, logits, greedy(logits))
    others_go_on = any(g for g, rule in zip(goes_on, rules, strict=True) if rule is None or not rule.step_cost)
    gain = 0.0
    for row, rule in enumerate(rules):
        if rule is not None and rule.step_cost:
            threshold = DEFAULT_THRESHOLDS[rule.policy] if rule.threshold is None else rule.threshold
            (score,) = scores_by_policy(rule.policy, logits[row : row + 1], greedy(logits[row : row + 1]))
            gain += max(score - threshold, 0.0)
    pays = others_go_on or gain >= sum(rule.step_cost for rule in rules if rule is not None)
    for row, rule in enumerate(rules):
        if rule is None:
            assert goes_on[row] and together.is_kept(row)
            continue
        own = logits[row : row + 1]
        (score,) = scores_by_policy(rule.policy, own, greedy(own))
        threshold = DEFAULT_THRESHOLDS[rule.policy] if rule.threshold is None else rule.threshold
        assert goes_on[row] == (score >= threshold and (pays or not rule.step_cost))
        assert together.is_kept(row) == (score >= rule.keep_threshold)


def test_optimal_stopping_goes_by_the_chance_that_all_drafts_so_far_are_right() -> None:
    rules = [StoppingRule(PolicyName.OPTIMAL, threshold=0.5), StoppingRule(PolicyName.ROUTER, threshold=0.5)]
    stopping = Stopping(rules, DEFAULT_THRESHOLDS)
    logits = torch.zeros(2, 3)
    assert [stopping.judge((0, 1), (True, True), Scores(0.8), logits, greedy(logits)) for _ in range(4)] == [
        [True, True],
        [True, True],
        [True, True],
        [False, True],  # 0.8 ** 4
    ]


def test_blocks_that_share_steps_go_on_while_together_they_pay_for_them() -> None:
    rule = StoppingRule(PolicyName.OPTIMAL, threshold=0.1, keep_threshold=0.02, step_cost=0.4)
    alone = StoppingRule(PolicyName.ROUTER, threshold=0.5)
    logits = torch.zeros(4, 3)

    def judged(*scores: float, may_go_on: Sequence[bool] = (True,) * 4) -> list[bool]:
        stopping = Stopping([rule, alone, rule, rule], DEFAULT_THRESHOLDS)
        return stopping.judge(range(4), may_go_on, Scores(*scores), logits, greedy(logits))

    assert judged(0.9, 0, 0.6, 0.05) == [True, False, True, False]  # gains of 0.8 and 0.5 against three times 0.4
    assert judged(0.9, 0, 0.4, 0.05) == [False, False, False, False]
    assert judged(0.9, 0, 0.6, 0.05, may_go_on=(False, True, True, True)) == [False, False, False, False]
    assert judged(0.9, 0.6, 0.4, 0.05) == [True, True, True, False]  # there is a step in any case
    # Those that have ended still wait: the step costs them time, too.
    stopping = Stopping([rule, alone, rule, rule], DEFAULT_THRESHOLDS)
    assert stopping.judge((0, 1), (True, True), Scores(0.99, 0), logits, greedy(logits)) == [False, False]


class Scores:
    """The same scores whatever is asked; the last one for all further blocks."""

    thresholds = DEFAULT_THRESHOLDS

    def __init__(self, *scores: float) -> None:
        self._scores = scores

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> list[float]:
        return [*self._scores, *self._scores[-1:] * len(logits)]


class ByPolicy:
    """A different score for each policy."""

    thresholds = DEFAULT_THRESHOLDS

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> list[float]:
        factor = {"entropy": 1.0, "router": 0.5, "optimal": 0.8}[policy.value]
        scores: list[float] = (entropy_score(logits) * factor).tolist()
        return scores


scores_by_policy = ByPolicy()


@given(st.floats(0, 1), st.floats(-3, 3))
def test_adjusted_scores_are_chances_and_keep_their_order(score: float, shift: float) -> None:
    odds = TextOdds(shift)
    assert 0 <= odds.adjust(score) <= 1
    assert odds.adjust(score / 2) <= odds.adjust(score)
    assert TextOdds().adjust(score) == pytest.approx(score, abs=2e-6)


@pytest.mark.parametrize(("score", "truth"), [(0.6, 0.9), (0.9, 0.6), (0.7, 0.7)])
def test_scores_are_adjusted_to_what_a_text_shows(score: float, truth: float) -> None:
    rng, odds, position = random.Random(0), TextOdds(), 10
    shown = []
    for _ in range(400):
        odds.expect(position, [1, 1, 1], [odds.adjust(score)] * 3)
        odds.learn(position - 1, [7, *(int(rng.random() < truth) for _ in range(3))])
        shown.append(odds.adjust(score))
    assert sum(shown[100:]) / 300 == pytest.approx(truth, abs=0.05)


def test_only_drafts_that_were_reached_teach_and_each_once() -> None:
    odds = TextOdds()
    odds.expect(10, [1, 2, 3], [0.5, 0.2, 0.5])
    odds.learn(9, [7, 1, 9, 3])  # right, wrong, and one that nobody looks at any more
    assert odds.shift == pytest.approx(0.045)
    odds.learn(9, [7, 1, 2, 3])
    assert odds.shift == pytest.approx(0.045)


@pytest.mark.parametrize("start", [2, 11, 500])
def test_tokens_at_other_positions_teach_nothing(start: int) -> None:
    odds = TextOdds()
    odds.expect(10, [1, 2], [0.2, 0.2])
    odds.learn(start, [1, 2])
    assert odds.shift == 0
