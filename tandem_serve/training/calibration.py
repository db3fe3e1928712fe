"""How good a predictor of acceptance is, and what it is worth: calibration, and blocks replayed with measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_BINS = 15


def calibration(scores: Tensor, is_right: Tensor) -> dict[str, Any]:
    """Scores [N], 0 to 1, against outcomes [N] bool: reliability diagram, Brier score, area under the ROC curve.

    `bins` has one entry a non-empty bin of equal width: mean score, share of right drafts, count.
    """
    right = is_right.double()
    which = (scores.double() * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    bins = []
    for number in which.unique().tolist():
        inside = which == number
        mean, share = float(scores[inside].double().mean()), float(right[inside].mean())
        bins.append({"score": mean, "accepted": share, "count": int(inside.sum())})
    error = sum(b["count"] * abs(b["score"] - b["accepted"]) for b in bins) / len(scores)
    return {
        "auc": area_under_curve(scores, is_right),
        "brier": float((scores.double() - right).square().mean()),
        "calibration_error": error,
        "bins": bins,
    }


def area_under_curve(scores: Tensor, is_right: Tensor) -> float | None:
    """The chance that a right draft scores higher than a wrong one, ties counting half; None without both kinds."""
    num_right = int(is_right.sum())
    num_wrong = len(scores) - num_right
    if not num_right or not num_wrong:
        return None
    _, which, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[which]  # of equals the mean, from 1
    return float((ranks[is_right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


@dataclass(frozen=True)
class RoundCosts:
    """What a round takes, in seconds: round_s and, for each draft, draft_s to make it and verify_s to check it."""

    round_s: float
    draft_s: float
    verify_s: float


@dataclass(frozen=True)
class Replayed:
    """Blocks as decoding would have opened them, one behind the other."""

    num_tokens: int
    num_rounds: int
    num_drafts: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def replay(
    is_right: Sequence[Sequence[Sequence[bool]]],  # [S][O][G]
    lengths: Sequence[Sequence[int]],  # [S][O]: drafts that a policy makes there, at most G
    costs: RoundCosts,
) -> Replayed:
    """Decodes the texts that the outcomes come from, with the blocks that a policy makes."""
    num_tokens = num_rounds = num_drafts = 0
    for text, chosen in zip(is_right, lengths, strict=True):
        opening = 0
        while opening < len(text):
            length = chosen[opening]
            block = text[opening][:length]
            num_accepted = block.index(False) if False in block else length
            num_tokens += num_accepted + 1
            num_rounds += 1
            num_drafts += length
            opening += num_accepted + 1
    seconds = num_rounds * costs.round_s + num_drafts * (costs.draft_s + costs.verify_s)
    return Replayed(num_tokens, num_rounds, num_drafts, seconds)


def block_lengths(scores: Tensor, threshold: float, *, compounds: bool) -> list[list[int]]:
    """Drafts [S][O] that a stopping rule makes, from scores [S, O, G]: up to and with the first that scores too low."""
    survival = scores.cumprod(-1) if compounds else scores
    goes_on = (survival >= threshold)[..., :-1].long().cumprod(-1)  # the last draft ends the block anyway
    lengths: list[list[int]] = (goes_on.sum(-1) + 1).tolist()
    return lengths


def fixed_lengths(is_right: Tensor, length: int) -> list[list[int]]:
    """Drafts [S][O] of a fixed block length, for outcomes [S, O, G]."""
    return torch.full(is_right.shape[:2], length).tolist()


def best_threshold(
    is_right: Tensor, scores: Tensor, costs: RoundCosts, *, compounds: bool, num_candidates: int = 39
) -> float:
    """The threshold with the most tokens a second."""
    outcomes = is_right.tolist()
    candidates = [i / (num_candidates + 1) for i in range(1, num_candidates + 1)]
    return max(
        candidates, key=lambda t: replay(outcomes, block_lengths(scores, t, compounds=compounds), costs).tokens_per_s
    )


def best_fixed(is_right: Tensor, costs: RoundCosts) -> int:
    """The fixed block length with the most tokens a second."""
    outcomes = is_right.tolist()
    return max(
        range(is_right.shape[-1] + 1),
        key=lambda length: replay(outcomes, fixed_lengths(is_right, length), costs).tokens_per_s,
    )
