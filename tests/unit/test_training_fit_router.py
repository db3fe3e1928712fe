"""What acceptance models are worth: chosen on some texts, measured on others."""

from __future__ import annotations

import pytest
import torch

from tandem_serve.models.acceptance import AcceptanceConfig, AcceptanceModel, draft_features
from tandem_serve.training.calibration import RoundCosts, block_lengths, replay
from tandem_serve.training.fit_router import _line, _slope, measure_acceptance
from tandem_serve.training.router_examples import RouterExamples
from tandem_serve.types import PolicyName

SHAPE = (6, 30, 5)  # texts, openings, drafts
COSTS = {
    policy: RoundCosts(round_s=1.0, draft_s=draft_s, verify_s=0.05)
    for policy, draft_s in (
        (PolicyName.FIXED, 0.1),
        (PolicyName.ENTROPY, 0.12),
        (PolicyName.ROUTER, 0.15),
        (PolicyName.OPTIMAL, 0.11),
    )
}


def _examples(seed: int, ease: float) -> RouterExamples:
    """Drafts that are right the more often, the more probable they are, in an easier or harder text."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((*SHAPE, 8), generator=random)
    logprobs = logits.log_softmax(-1).max(-1).values
    is_right = torch.rand(SHAPE, generator=random) < ease * logprobs.exp()
    features = draft_features(logits, logprobs, torch.zeros(SHAPE, dtype=torch.bool), 4)
    return RouterExamples(features, is_right, torch.zeros(SHAPE))


def test_what_is_chosen_knows_nothing_of_what_is_measured() -> None:
    torch.manual_seed(0)
    model, embedding = AcceptanceModel(AcceptanceConfig(16)).eval(), torch.randn(8, 16)
    chosen_on, easy, hard = _examples(0, 0.9), _examples(1, 1.0), _examples(2, 0.3)
    of_easy, of_hard = (measure_acceptance(model, chosen_on, some, embedding, COSTS) for some in (easy, hard))
    for name, figures in of_easy["policies"].items():
        for choice in {"threshold", "block_length"} & figures.keys():
            assert figures[choice] == of_hard["policies"][name][choice]
        assert figures["tokens_per_s"] > of_hard["policies"][name]["tokens_per_s"]
    assert of_easy["share_right"] > 2 * of_hard["share_right"]
    assert of_easy["num_texts"] == 6
    # Another choice is another threshold: the texts do matter.
    of_other = measure_acceptance(model, hard, easy, embedding, COSTS)
    assert of_other["policies"]["optimal"]["threshold"] != of_easy["policies"]["optimal"]["threshold"]


def test_rules_are_replayed_apart_from_predictors() -> None:
    torch.manual_seed(0)
    model, embedding = AcceptanceModel(AcceptanceConfig(16)).eval(), torch.randn(8, 16)
    measured = _examples(1, 0.9)
    found = measure_acceptance(model, _examples(0, 0.9), measured, embedding, COSTS)["policies"]
    assert set(found) == {
        "fixed", "entropy", "router", "optimal",
        "entropy, by product", "router, by product", "optimal, by last draft",
    }  # fmt: skip
    features = measured.features
    scores = {
        "router": model.mlp(features, embedding).sigmoid(),
        "optimal": model.quick(features.draft_logprob, features.is_sampled).sigmoid(),
    }
    for name, score in scores.items():
        lengths = block_lengths(score, found[name]["threshold"], compounds=name == "optimal")
        replayed = replay(measured.is_right.tolist(), lengths, COSTS[PolicyName(name)])
        assert found[name]["tokens_per_s"] == replayed.tokens_per_s
    assert found["optimal"]["tokens_per_s"] != found["optimal, by last draft"]["tokens_per_s"]


def test_lines() -> None:
    assert _line({1: 3.0, 2: 5.0, 4: 9.0}) == pytest.approx((1.0, 2.0))
    assert _line({1: 4.0, 2: 2.0}) == (3.0, 0.0)  # nothing gets cheaper by being longer
    noisy = {1: 3.1, 4: 8.7, 8: 17.3, 16: 33.2}
    intercept, slope = _line(noisy)
    assert _slope(noisy, intercept) == pytest.approx(slope)
    assert _slope({1: 2.0, 2: 3.0}, 5.0) == 0
