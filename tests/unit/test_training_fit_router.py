"""What acceptance models are worth: chosen on some texts, measured on others."""

from __future__ import annotations

import torch

from tandem_serve.models.acceptance import AcceptanceConfig, AcceptanceModel, draft_features
from tandem_serve.training.calibration import RoundCosts
from tandem_serve.training.fit_router import measure_acceptance
from tandem_serve.training.router_examples import RouterExamples
from tandem_serve.types import PolicyName

SHAPE = (6, 30, 5)  # texts, openings, drafts
COSTS = {
    policy: RoundCosts(round_s=1.0, draft_s=0.1, verify_s=0.05)
    for policy in (PolicyName.FIXED, PolicyName.ENTROPY, PolicyName.ROUTER, PolicyName.OPTIMAL)
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
    found = measure_acceptance(model, _examples(0, 0.9), _examples(1, 0.9), embedding, COSTS)["policies"]
    assert set(found) == {
        "fixed", "entropy", "router", "optimal",
        "entropy, by product", "router, by product", "optimal, by last draft",
    }  # fmt: skip
    assert found["optimal"]["over_fixed"] > 1
    assert found["optimal"] != found["optimal, by last draft"]
