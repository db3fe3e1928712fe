"""Losses, schedule and generation against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tandem_serve.training.generate import continuations
from tandem_serve.training.losses import distillation_loss, next_token_loss
from tandem_serve.training.optimizer import ModelOptimizer, OptimizerConfig, rate_factor
from tandem_serve.training.primary import sequence_logits
from tests.small_models import small_decoder, small_tandem


def test_distillation_is_the_weighted_sum_of_two_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11).softmax(-1)
    targets = torch.randint(11, (2, 5))
    truth = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    soft = F.cross_entropy(logits.flatten(0, 1), teacher.flatten(0, 1))
    assert torch.isclose(next_token_loss(logits, targets), truth)
    assert torch.isclose(distillation_loss(logits, targets, teacher, 0.0), truth)
    assert torch.isclose(distillation_loss(logits, targets, teacher, 0.5), (truth + soft) / 2)
    assert torch.isclose(distillation_loss(logits, targets, teacher, 1.0), soft)


def test_the_rate_warms_up_stays_and_decays() -> None:
    config = OptimizerConfig(warmup_share=0.1, decay_share=0.5)
    rates = [rate_factor(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[:10] == sorted(rates[:10])
    assert set(rates[10:50]) == {1.0}
    assert rates[50:] == sorted(rates[50:], reverse=True) and rates[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("muon", [True, False])
def test_every_parameter_is_optimized_once(muon: bool) -> None:
    drafter = small_tandem(small_decoder(3, 24, 0)).requires_grad_(True)
    before = {n: p.detach().clone() for n, p in drafter.named_parameters()}
    optimizer = ModelOptimizer(drafter, OptimizerConfig(muon=muon))
    torch.stack([(p * torch.randn_like(p)).sum() for p in drafter.parameters()]).sum().backward()
    assert optimizer.step(1.0) > 0
    assert all(not torch.equal(before[n], p) for n, p in drafter.named_parameters())
    assert all(p.grad is None for p in drafter.parameters())


def test_continuations_equal_repeated_whole_passes() -> None:
    primary = small_decoder(3, 24, 0)
    prompts = torch.randint(37, (3, 6), generator=torch.Generator().manual_seed(1))
    texts = continuations(primary, prompts, 9)
    expected = prompts
    for _ in range(9):
        expected = torch.cat((expected, sequence_logits(primary, expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(texts, expected)
    assert not torch.equal(continuations(primary, prompts, 9, temperature=1.0, seed=1), texts)
