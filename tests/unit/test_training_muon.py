"""Muon in float32 is torch's Muon, but for bf16's rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tandem_serve.training.muon import Float32Muon, orthogonalize
from tandem_serve.training.optimizer import ModelOptimizer, OptimizerConfig
from tests.small_models import small_decoder

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4}
Muon = type[torch.optim.Muon]


def trained(steps: list[Muon], shape: tuple[int, int]) -> torch.Tensor:
    """A matrix after a step of each optimizer, with the state handed on; gradients of one seed."""
    generator = torch.Generator().manual_seed(3)
    weights = nn.Parameter(torch.randn(shape, generator=generator))
    state = None
    for muon in steps:
        optimizer = muon([weights], **OPTIONS)  # type: ignore[arg-type]
        if state is not None:
            optimizer.load_state_dict(state)
        weights.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        state = optimizer.state_dict()
    return weights.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_steps_are_those_of_torch_and_either_goes_on_from_the_other_s_state(shape: tuple[int, int]) -> None:
    begun, expected = trained([], shape), trained([torch.optim.Muon] * 3, shape)
    moved = (expected - begun).norm()
    for steps in ([Float32Muon] * 3, [torch.optim.Muon, Float32Muon, torch.optim.Muon]):
        assert (trained(steps, shape) - expected).norm() < 0.01 * moved


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    group = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}
    result = orthogonalize(matrix, group)
    assert all(0.5 < value < 1.3 for value in torch.linalg.svdvals(result))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ v.T
    assert torch.allclose(inner, inner.diagonal().diag(), atol=1e-4)


def test_a_cpu_runs_the_float32_one() -> None:
    optimizer = ModelOptimizer(small_decoder(2, 24, 0).requires_grad_(True), OptimizerConfig())
    assert [type(each) for each in optimizer._optimizers] == [torch.optim.AdamW, Float32Muon]
