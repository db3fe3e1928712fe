"""Chances of acceptance against sums over every outcome and against the engine's own noise."""

from __future__ import annotations

import itertools

import pytest
import torch

from tandem_serve.decoding.sampling import gumbel_noise
from tandem_serve.training.couplings import (
    block_acceptance,
    measure_couplings,
    shared_noise_agreement,
    token_acceptance,
)
from tests.small_models import small_decoder, small_tandem


def _pair_of_distributions(size: int, seed: int, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    p, noise = torch.randn(2, size, generator=random, dtype=torch.float64)
    return (p * sharpness).softmax(-1), (p * sharpness + noise).softmax(-1)


def test_shared_noise_agreement_equals_its_definition() -> None:
    p, q = _pair_of_distributions(9, 0)
    direct = torch.stack([1 / torch.maximum(p / p[v], q / q[v]).sum() for v in range(9)])
    assert torch.allclose(shared_noise_agreement(p, q), direct)
    assert torch.allclose(shared_noise_agreement(p, p), p)


def test_shared_noise_agreement_is_what_the_engines_noise_does() -> None:
    p, q = _pair_of_distributions(6, 1)
    noise = gumbel_noise(torch.arange(40_000), torch.zeros(40_000, dtype=torch.long), 6)
    ours, theirs = (p.log() + noise).argmax(-1), (q.log() + noise).argmax(-1)
    both = torch.bincount(ours[ours == theirs], minlength=6) / 40_000
    assert (both - shared_noise_agreement(p, q)).abs().max() < 0.01


def test_one_token_couplings_are_ordered() -> None:
    for seed in range(20):
        p, q = _pair_of_distributions(50, seed, sharpness=3.0)
        chance = token_acceptance(p, q)
        assert chance["bound"] - 1e-12 <= chance["shared_noise"] <= chance["rejection"] + 1e-12
        assert chance["sampled_draft"] <= chance["rejection"] + 1e-12
        assert float(chance["greedy_draft"]) == float(p[q.argmax()])
    even = torch.full((4,), 0.25, dtype=torch.float64)
    assert token_acceptance(even, even)["rejection"] == 1 and token_acceptance(even, even)["bound"] == 1


def test_block_couplings_equal_sums_over_all_drafts() -> None:
    """Independent positions of 3 tokens, blocks of 3: expectations over drafts, as the methods are defined."""
    places = [_pair_of_distributions(3, seed) for seed in (3, 4, 5)]
    expected = {name: torch.zeros(3, dtype=torch.float64) for name in ("rejection", "block_verification")}
    ours = {name: torch.zeros(3, dtype=torch.float64) for name in (*expected, "shared_noise")}
    for text in itertools.product(range(3), repeat=3):
        p = torch.stack([place[0][v] for place, v in zip(places, text, strict=True)])
        q = torch.stack([place[1][v] for place, v in zip(places, text, strict=True)])
        agreement = torch.stack([shared_noise_agreement(*place)[v] for place, v in zip(places, text, strict=True)])
        for name, chance in block_acceptance(p, q, agreement).items():
            ours[name] += p.prod() * chance
        running = torch.ones((), dtype=torch.float64)  # p_i of arXiv 2403.10444, whose P(accept i | drafts) it is
        for i in range(3):
            running = (running * p[i] / q[i]).clamp_max(1)
            expected["block_verification"][i] += q.prod() * running
            expected["rejection"][i] += q.prod() * (p / q).clamp_max(1)[: i + 1].prod()
    for name, value in expected.items():
        assert torch.allclose(ours[name], value), name
    assert (ours["block_verification"] >= ours["rejection"] - 1e-12).all()
    assert float(ours["shared_noise"][0]) == pytest.approx(float(shared_noise_agreement(*places[0]).sum()))


def test_couplings_of_a_drafter_with_itself_accept_everything() -> None:
    primary = small_decoder(3, 24, 0)
    texts = torch.randint(37, (2, 16), generator=torch.Generator().manual_seed(0))
    sizes = {"block_length": 3, "num_tokens": 12, "temperatures": (0.2, 1.2)}
    report = measure_couplings(primary, primary, [texts], texts[:, :4], **sizes)
    for figures in report.values():
        assert figures["token"]["shared_noise"] == pytest.approx(1)
        assert figures["block"]["shared_noise"] == pytest.approx(3)
    other = measure_couplings(primary, small_tandem(primary), [texts], texts[:, :4], **sizes)
    for figures in other.values():
        assert figures["token"]["bound"] <= figures["token"]["shared_noise"] <= figures["token"]["rejection"] < 1
        assert figures["block"]["rejection"] <= figures["block"]["block_verification"] + 1e-9 < 3
