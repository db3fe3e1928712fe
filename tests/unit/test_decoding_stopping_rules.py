"""When a block ends: scores, and rules that judge each block of a batch alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tandem_serve.decoding.stopping_rules import DEFAULT_THRESHOLDS, UNTRAINED, StoppingRows, entropy_score
from tandem_serve.types import PolicyName, StoppingRule

ADAPTIVE = [policy for policy in PolicyName if policy is not PolicyName.FIXED]


def test_entropy_score() -> None:
    certain = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    logits = torch.stack([certain, torch.zeros(4)])
    assert entropy_score(logits).tolist() == pytest.approx([1.0, 1 - math.sqrt(0.2 * math.log(4))])


def test_without_a_model_optimal_stopping_goes_by_the_draft_s_own_probability() -> None:
    logits = torch.tensor([[0.512, 0.488], [0.729, 0.271]]).log()
    scores = UNTRAINED(PolicyName.OPTIMAL, logits, torch.tensor([0, 0]))
    assert scores.tolist() == pytest.approx([0.8, 0.9])
    assert torch.equal(UNTRAINED(PolicyName.ROUTER, logits, torch.tensor([0, 0])), entropy_score(logits))


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
    found = together.survival(survival, scores_by_policy, logits, logits.argmax(-1))
    goes_on, is_kept = together.goes_on(found), together.is_kept(found)
    for row, rule in enumerate(rules):
        if rule is None:
            assert goes_on[row]
            continue
        score = float(scores_by_policy(rule.policy, logits[row : row + 1], logits[row : row + 1].argmax(-1)))
        expected = torch.tensor(score * float(survival[row]) if rule.policy is PolicyName.OPTIMAL else score)
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-6)
        if rule.threshold is not None and abs(rule.threshold - expected) > 1e-5:
            assert bool(goes_on[row]) == (float(expected) >= rule.threshold)
        if abs(rule.keep_threshold - expected) > 1e-5:
            assert bool(is_kept[row]) == (float(expected) >= rule.keep_threshold)
        alone = together.select(torch.tensor([row]))
        rows = slice(row, row + 1)
        score_alone = alone.survival(survival[rows], scores_by_policy, logits[rows], logits[rows].argmax(-1))
        assert bool(alone.goes_on(score_alone)) == bool(goes_on[row])


class ByPolicy:
    """A different score for each policy."""

    thresholds = DEFAULT_THRESHOLDS

    def __call__(self, policy: PolicyName, logits: Tensor, token_ids: Tensor) -> Tensor:
        return entropy_score(logits) * {"entropy": 1.0, "router": 0.5, "optimal": 0.8}[policy.value]


scores_by_policy = ByPolicy()
