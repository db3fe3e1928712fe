"""When a block ends: scores, and rules that judge each block of a batch alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tandem_serve.decoding.sampling import Choice, SamplingRows, choose_token_ids
from tandem_serve.decoding.stopping_rules import (
    DEFAULT_THRESHOLDS,
    UNTRAINED,
    StoppingRows,
    entropy_score,
    own_logprobs,
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
    scores = UNTRAINED(PolicyName.OPTIMAL, logits, greedy(logits))
    assert scores.tolist() == pytest.approx([0.8, 0.9])
    assert torch.equal(UNTRAINED(PolicyName.ROUTER, logits, greedy(logits)), entropy_score(logits))


def test_a_sampled_draft_is_as_clear_as_its_lead_over_the_next_noise_included() -> None:
    """Not as its probability: a rare token whose noise is far ahead is sure, since the primary adds the same noise."""
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    rows = SamplingRows.from_params([(SamplingParams(temperature=0.8, seed=7), position) for position in range(200)])
    choice = choose_token_ids(logits, rows)
    disturbed = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    stays = choose_token_ids(disturbed, rows).token_ids == choice.token_ids
    probs = logits.softmax(-1).gather(-1, choice.token_ids[:, None])[:, 0]
    by_lead, by_probability = (area_under_curve(score, stays) for score in (own_logprobs(choice), probs))
    assert by_lead is not None and by_probability is not None and by_lead > by_probability + 0.1


def greedy(logits: Tensor) -> Choice:
    return choose_token_ids(logits, SamplingRows.from_params([(SamplingParams(temperature=0), 0)] * len(logits)))


@given(
    rules=st.lists(
        st.one_of(
            st.none(),
            st.builds(StoppingRule, st.sampled_from(ADAPTIVE), st.one_of(st.none(), st.floats(0, 1)), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 99),
)
def test_each_block_is_judged_by_its_own_rule_whatever_the_batch(rules: list[StoppingRule | None], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    survival, logits = torch.rand(len(rules), generator=random), torch.randn(len(rules), 9, generator=random) * 3
    together = StoppingRows.of(rules, DEFAULT_THRESHOLDS, torch.device("cpu"))
    if together is None:
        assert not any(rules)
        return
    found = together.survival(survival, scores_by_policy, logits, greedy(logits))
    goes_on, is_kept = together.goes_on(found), together.is_kept(found)
    for row, rule in enumerate(rules):
        if rule is None:
            assert goes_on[row]
            continue
        rows = slice(row, row + 1)
        score = float(scores_by_policy(rule.policy, logits[rows], greedy(logits[rows])))
        expected = torch.tensor(score * float(survival[row]) if rule.policy is PolicyName.OPTIMAL else score)
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-6)
        decides_alone = together.step_cost is None or not together.shares[row]
        if decides_alone and rule.threshold is not None and abs(rule.threshold - expected) > 1e-5:
            assert bool(goes_on[row]) == (float(expected) >= rule.threshold)
        if abs(rule.keep_threshold - expected) > 1e-5:
            assert bool(is_kept[row]) == (float(expected) >= rule.keep_threshold)
        alone = together.select(torch.tensor([row]))
        score_alone = alone.survival(survival[rows], scores_by_policy, logits[rows], greedy(logits[rows]))
        if decides_alone:
            assert bool(alone.goes_on(score_alone)) == bool(goes_on[row])


def test_blocks_under_optimal_stopping_go_on_while_together_they_pay_for_the_step() -> None:
    rule = StoppingRule(PolicyName.OPTIMAL, threshold=0.5, keep_threshold=0.1)
    rows = StoppingRows.of([rule, None, rule, rule], DEFAULT_THRESHOLDS, torch.device("cpu"))
    assert rows is not None
    goes_on = rows.goes_on(torch.tensor([0.9, 0.0, 0.6, 0.05]))  # gains of 0.8 and 0.5 against three times 0.4
    assert goes_on.tolist() == [True, True, True, False]
    assert rows.goes_on(torch.tensor([0.9, 0.0, 0.4, 0.05])).tolist() == [False, True, False, False]
    # Those that have ended still wait: the step costs them time, too.
    left = rows.select(torch.tensor([0, 1]))
    assert left.goes_on(torch.tensor([0.99, 1.0])).tolist() == [False, True]


class ByPolicy:
    """A different score for each policy."""

    thresholds = DEFAULT_THRESHOLDS

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> Tensor:
        return entropy_score(logits) * {"entropy": 1.0, "router": 0.5, "optimal": 0.8}[policy.value]


scores_by_policy = ByPolicy()
