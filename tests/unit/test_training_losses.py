"""Losses, schedule and evaluation against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem_serve.models.decoder import Decoder, DecoderConfig, causal_attention
from tandem_serve.models.tandem import TandemConfig, TandemDrafter
from tandem_serve.training.evaluate import evaluate_drafting, evaluate_on_text
from tandem_serve.training.generate import continuations
from tandem_serve.training.losses import distillation_loss, next_token_loss
from tandem_serve.training.optimizer import ModelOptimizer, OptimizerConfig, rate_factor
from tandem_serve.training.primary import sequence_logits


def _decoder(layers: int, width: int, seed: int) -> Decoder:
    shape = DecoderConfig(
        vocab_size=37,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    decoder = Decoder(shape).init_weights(seed, std=0.4)
    return decoder.eval().requires_grad_(False)


def _tandem(primary: Decoder, seed: int = 3) -> TandemDrafter:
    config = TandemConfig(((2,), (3,)), primary.config.hidden_size, 3, "")
    drafter = TandemDrafter(_decoder(2, 16, seed), config).init_projections(seed)
    return drafter.requires_grad_(False)


def _greedy_draft(primary: Decoder, drafter: TandemDrafter, text: Tensor, opening: int, length: int) -> list[int]:
    """Drafts one block token by token, each from a pass over the whole text before it."""
    tokens = text[: opening + 1].tolist()
    for _ in range(length):
        ids = torch.tensor([tokens])
        positions = torch.arange(len(tokens))
        taps = primary(ids, positions, causal_attention(primary.config, len(tokens)), drafter.taps).taps
        blocks = (positions >= opening).long()[None]
        logits = drafter.logits(drafter.forward_blocks(ids, torch.stack(taps, -2), blocks))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[opening + 1 :]


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
    drafter = _tandem(_decoder(3, 24, 0)).requires_grad_(True)
    before = {n: p.detach().clone() for n, p in drafter.named_parameters()}
    optimizer = ModelOptimizer(drafter, OptimizerConfig(muon=muon))
    torch.stack([(p * torch.randn_like(p)).sum() for p in drafter.parameters()]).sum().backward()
    assert optimizer.step(1.0) > 0
    assert all(not torch.equal(before[n], p) for n, p in drafter.named_parameters())
    assert all(p.grad is None for p in drafter.parameters())


def test_continuations_equal_repeated_whole_passes() -> None:
    primary = _decoder(3, 24, 0)
    prompts = torch.randint(37, (3, 6), generator=torch.Generator().manual_seed(1))
    texts = continuations(primary, prompts, 9)
    expected = prompts
    for _ in range(9):
        expected = torch.cat((expected, sequence_logits(primary, expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(texts, expected)
    assert not torch.equal(continuations(primary, prompts, 9, temperature=1.0, seed=1), texts)


def test_parallel_drafting_accepts_what_token_by_token_drafting_would() -> None:
    primary = _decoder(3, 24, 0)
    drafter = _tandem(primary)
    with torch.no_grad():  # near copies of the primary's embedding make some drafts right and some wrong
        drafter.decoder.embedding[:, :16] = primary.embedding[:, :16]
    prompts = torch.randint(37, (4, 5), generator=torch.Generator().manual_seed(1))
    texts = continuations(primary, prompts, 30)
    report = evaluate_drafting(primary, drafter, texts, 5, 3)
    blocks, accepted = 0, 0
    for text in texts:
        opening = 5
        while opening < len(text) - 3:
            drafts = _greedy_draft(primary, drafter, text, opening, 3)
            right = [d == int(t) for d, t in zip(drafts, text[opening + 1 :], strict=False)]
            count = right.index(False) if False in right else 3
            blocks, accepted, opening = blocks + 1, accepted + count, opening + count + 1
    assert report["num_blocks"] == blocks
    assert 0 < accepted < 3 * blocks  # else the comparison shows nothing
    assert report["accepted_per_block"] == pytest.approx(accepted / blocks)


def test_a_primary_agrees_with_itself() -> None:
    primary = _decoder(3, 24, 0)
    texts = continuations(primary, torch.zeros(2, 4, dtype=torch.long), 20)
    report = evaluate_drafting(primary, primary, texts, 4, 4)
    assert report["accepted_per_block"] == 4 and report["agreement"] == 100
    figures = evaluate_on_text(primary, primary, [texts], 2)
    assert figures["agreement"] == 100 and figures["total_variation"] == pytest.approx(0, abs=1e-6)
