"""Calibration figures and replayed blocks, against the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem_serve.training.calibration import (
    RoundCosts,
    area_under_curve,
    best_fixed,
    best_threshold,
    block_lengths,
    calibration,
    fixed_lengths,
    replay,
)

COSTS = RoundCosts(round_s=1.0, draft_s=0.1, verify_s=0.05)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30))
def test_area_under_curve_is_the_share_of_pairs_in_order(pairs: list[tuple[float, bool]]) -> None:
    right = [score for score, is_right in pairs if is_right]
    wrong = [score for score, is_right in pairs if not is_right]
    found = area_under_curve(torch.tensor([s for s, _ in pairs]), torch.tensor([r for _, r in pairs]))
    if not right or not wrong:
        assert found is None
        return
    in_order = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    assert found == pytest.approx(in_order / (len(right) * len(wrong)))


def test_calibration() -> None:
    found = calibration(torch.tensor([0.9, 0.9, 0.9, 0.1]), torch.tensor([True, True, False, False]))
    assert found["brier"] == pytest.approx((0.01 + 0.01 + 0.81 + 0.01) / 4)
    assert [(b["count"], round(b["score"], 4), round(b["accepted"], 4)) for b in found["bins"]] == [
        (1, 0.1, 0.0),
        (3, 0.9, 0.6667),
    ]
    assert found["calibration_error"] == pytest.approx((0.1 + 3 * (0.9 - 2 / 3)) / 4, abs=1e-6)


def test_replay_opens_each_block_behind_the_last_one_s_accepted_drafts() -> None:
    right = [[[True, True, False], [False] * 3, [False] * 3, [True] * 3, [False] * 3, [False] * 3, [False] * 3]]
    found = replay(right, [[3, 0, 0, 2, 0, 0, 1]], COSTS)
    # Two of three accepted and one token more; then two of two and one more; then one wrong draft.
    assert (found.num_tokens, found.num_rounds, found.num_drafts) == (3 + 3 + 1, 3, 3 + 2 + 1)
    assert found.seconds == pytest.approx(3 * 1.0 + 6 * 0.15)


def test_a_block_ends_with_the_first_draft_that_scores_too_low() -> None:
    scores = torch.tensor([[[0.9, 0.9, 0.9, 0.1], [0.9, 0.4, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9]]])
    assert block_lengths(scores, 0.5, compounds=False) == [[4, 2, 1]]
    assert block_lengths(scores, 0.8, compounds=True) == [[3, 2, 1]]
    assert block_lengths(scores, 0.0, compounds=True) == [[4, 4, 4]]


def test_a_rule_that_knows_beats_every_fixed_length() -> None:
    random = torch.Generator().manual_seed(0)
    is_right = torch.rand((20, 40, 6), generator=random) < torch.rand((20, 40, 1), generator=random)
    scores = 0.1 + 0.8 * is_right.float()
    length = best_fixed(is_right, COSTS)
    threshold = best_threshold(is_right, scores, COSTS, compounds=False)
    assert 0 < length < 6
    assert 0.1 < threshold < 0.9
    fixed = replay(is_right.tolist(), fixed_lengths(is_right, length), COSTS)
    replayed = replay(is_right.tolist(), block_lengths(scores, threshold, compounds=False), COSTS)
    assert replayed.tokens_per_s > 1.2 * fixed.tokens_per_s
    assert replayed.num_drafts < fixed.num_drafts or length < 3
