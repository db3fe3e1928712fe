"""Prefix acceptance against its definition, and coupled speculative decoding against plain decoding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.decoding.verify import accept_prefix
from tandem_serve.types import SamplingParams

_TOKENS = st.integers(0, 2)


@given(st.integers(0, 5), st.data())
@settings(max_examples=200)
def test_accepts_the_longest_equal_prefix_of_ragged_blocks(width: int, data: st.DataObject) -> None:
    blocks = data.draw(st.lists(st.lists(_TOKENS, max_size=width), min_size=1, max_size=6))
    targets = [data.draw(st.lists(_TOKENS, min_size=len(b) + 1, max_size=len(b) + 1)) for b in blocks]
    filler = data.draw(st.sampled_from([-1, 0]))  # what a caller leaves past a short block is nobody's business
    verdict = accept_prefix(
        torch.tensor([b + [-1] * (width - len(b)) for b in blocks]).reshape(len(blocks), width),
        torch.tensor([t + [filler] * (width + 1 - len(t)) for t in targets]),
    )
    for row, (block, target) in enumerate(zip(blocks, targets, strict=True)):
        accepted = 0
        while accepted < len(block) and block[accepted] == target[accepted]:
            accepted += 1
        assert verdict.num_accepted_tokens[row].item() == accepted
        assert verdict.next_token_ids[row].item() == target[accepted]


def _logits(prefix: list[int], salt: int, sharpness: float) -> Tensor:
    """A toy language model: logits [1, V] that depend on the last two tokens."""
    generator = torch.Generator().manual_seed(hash((tuple(prefix[-2:]), salt)) % 2**31)
    return torch.randn(1, 20, generator=generator) * sharpness


def _target_logits(prefix: list[int]) -> Tensor:
    return _logits(prefix, 0, 2.0)


def _draft_logits(prefix: list[int]) -> Tensor:
    return _logits(prefix, 0, 2.0) + _logits(prefix, 1, 0.7)


def _choose(logits: Tensor, params: SamplingParams, position: int) -> int:
    return int(choose_token_ids(logits, SamplingRows.from_params([(params, position)])).token_ids[0])


@given(
    st.sampled_from([0.0, 0.6, 1.0]),
    st.sampled_from([1.0, 0.9]),
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.integers(0, 12),
)
@settings(max_examples=25)
def test_speculative_reblocked_and_restarted_runs_equal_plain(
    temperature: float, top_p: float, seed: int, block_lengths: list[int], restart_at: int
) -> None:
    """Any block lengths, and a replay from any point, give the tokens of one-by-one decoding: lossless."""
    params, prompt, num_tokens = SamplingParams(temperature=temperature, top_p=top_p, seed=seed), [1, 2], 24
    plain = list(prompt)
    while len(plain) < len(prompt) + num_tokens:
        plain.append(_choose(_target_logits(plain), params, len(plain)))

    text, accepted_in_all = list(plain[: len(prompt) + restart_at]), 0  # a failover resubmits what was delivered
    for block_length in block_lengths * num_tokens:
        if len(text) >= len(plain):
            break
        drafted = list(text)
        for _ in range(block_length):
            drafted.append(_choose(_draft_logits(drafted), params, len(drafted)))
        prefixes = [drafted[: len(text) + i] for i in range(block_length + 1)]
        rows = SamplingRows.from_params([(params, len(prefix)) for prefix in prefixes])
        target = choose_token_ids(torch.cat([_target_logits(prefix) for prefix in prefixes]), rows).token_ids
        verdict = accept_prefix(torch.tensor([drafted[len(text) :]], dtype=torch.int64), target[None])
        accepted = int(verdict.num_accepted_tokens)
        accepted_in_all += accepted
        text = [*drafted[: len(text) + accepted], int(verdict.next_token_ids)]
    assert text[: len(plain)] == plain[: len(text)]
    assert len(text) >= len(plain) or not any(block_lengths)
