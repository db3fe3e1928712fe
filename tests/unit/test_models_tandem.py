"""The tandem drafter: incremental drafting over a cache is the training pass, whatever the blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import load_decoder, load_drafter
from tandem_serve.models.decoder import Decoder, DecoderConfig, causal_attention
from tandem_serve.models.tandem import TandemConfig, TandemDrafter, resolve_layer_map
from tests.checkpoints import make_drafter, make_primary
from tests.dense_cache import DenseCache

NUM_TOKENS = 24
PRIMARY_HIDDEN = 20
LLAMA = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, model_type="qwen2", attention_bias=True, tie_word_embeddings=True),
    "qwen3": replace(LLAMA, model_type="qwen3", qk_norm=True, num_kv_heads=1),
    "mistral": replace(LLAMA, model_type="mistral", sliding_windows=(5, 5)),
    "mixed windows": replace(LLAMA, model_type="qwen2", attention_bias=True, sliding_windows=(None, 3)),
}


def build(name: str, layer_map: tuple[tuple[int, ...], ...]) -> TandemDrafter:
    decoder = Decoder(CONFIGS[name]).init_weights(3, std=0.4)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    drafter = TandemDrafter(decoder, TandemConfig(layer_map, PRIMARY_HIDDEN, 9, "f00d")).init_projections(5)
    return drafter.requires_grad_(False)


def random_input(drafter: TandemDrafter, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, drafter.decoder.config.vocab_size, (NUM_TOKENS,), generator=generator)
    taps = torch.randn(NUM_TOKENS, len(drafter.taps), PRIMARY_HIDDEN, generator=generator) * 30
    return token_ids, taps


def draft_incrementally(
    drafter: TandemDrafter, token_ids: Tensor, representations: Tensor, starts: list[int]
) -> Tensor:
    """As in serving: one token at a time within a block, then the block's cache is overwritten from the taps."""
    cache = DenseCache(drafter.decoder.config, NUM_TOKENS)
    hidden = []
    for start, end in zip(starts, [*starts[1:], NUM_TOKENS], strict=True):
        for position in torch.arange(start, end).split(1):
            hidden.append(drafter.decoder(token_ids[position], position, cache.attend(position)).hidden)
        block = torch.arange(start, end)
        cache.write(block, drafter.project(representations[block], block))
    return torch.cat(hidden)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    layer_map=st.sampled_from([((9,), (9,)), ((9,), (4,)), ((0,), (7,)), ((4, 9), (9, 0))]),
    inner=st.sets(st.integers(1, NUM_TOKENS - 1)),
    seed=st.integers(0, 1000),
)
def test_cached_drafting_equals_the_parallel_pass(
    name: str, layer_map: tuple[tuple[int, ...], ...], inner: set[int], seed: int
) -> None:
    drafter, starts = build(name, layer_map), [0, *sorted(inner)]
    token_ids, representations = random_input(drafter, seed)
    block_index = torch.tensor([sum(start <= i for start in starts) for i in range(NUM_TOKENS)])
    parallel = drafter.forward_blocks(token_ids[None], representations[None], block_index[None])[0]
    incremental = draft_incrementally(drafter, token_ids, representations, starts)
    torch.testing.assert_close(incremental, parallel, atol=2e-5, rtol=1e-4)


def test_each_sequence_of_a_batch_may_have_its_own_blocks() -> None:
    drafter = build("llama", ((4,), (9,)))
    inputs = [random_input(drafter, seed) for seed in (1, 2)]
    blocks = torch.stack([torch.arange(NUM_TOKENS) // 3, torch.arange(NUM_TOKENS) // 7])
    together = drafter.forward_blocks(
        torch.stack([ids for ids, _ in inputs]), torch.stack([taps for _, taps in inputs]), blocks
    )
    for row, (token_ids, taps) in enumerate(inputs):
        alone = drafter.forward_blocks(token_ids[None], taps[None], blocks[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)


def test_one_block_is_the_plain_decoder_and_ignores_the_primary() -> None:
    drafter = build("llama", ((4,), (9,)))
    token_ids, representations = random_input(drafter, 1)
    blocks = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
    attend = causal_attention(drafter.decoder.config, NUM_TOKENS)
    plain = drafter.decoder(token_ids[None], torch.arange(NUM_TOKENS), attend).hidden
    torch.testing.assert_close(drafter.forward_blocks(token_ids[None], representations[None], blocks), plain)


def test_a_position_sees_the_primary_of_earlier_blocks_only() -> None:
    drafter = build("llama", ((4,), (9,)))
    token_ids, representations = random_input(drafter, 1)
    blocks = (torch.arange(NUM_TOKENS) // 4)[None]
    before = drafter.forward_blocks(token_ids[None], representations[None], blocks)[0]
    representations[8:] += 1  # from the third block on
    after = drafter.forward_blocks(token_ids[None], representations[None], blocks)[0]
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed.tolist() == [False] * 12 + [True] * (NUM_TOKENS - 12)


def test_the_size_of_a_tap_does_not_matter() -> None:
    """A tap of 0.05 would be lost in the layer norm's epsilon, if it were not normalised itself."""
    drafter = build("llama", ((9,), (9,)))
    _, representations = random_input(drafter, 1)
    positions = torch.arange(NUM_TOKENS)
    large, small = drafter.project(representations, positions), drafter.project(representations / 600, positions)
    for (k, v), (small_k, small_v) in zip(large, small, strict=True):
        torch.testing.assert_close(k, small_k, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(v, small_v, atol=1e-3, rtol=1e-3)
    enormous = (representations * 1e30).bfloat16()
    assert all(k.isfinite().all() and v.isfinite().all() for k, v in drafter.project(enormous, positions))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_cached_for_an_input_is_what_the_layer_itself_would_cache(name: str) -> None:
    decoder = build(name, ((9,), (9,))).decoder
    token_ids, positions = torch.arange(10), torch.arange(20, 30)
    cached: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cached.append((k, v))
        return q.flatten(-2)

    inputs = decoder(token_ids, positions, attend, taps=(0, 1)).taps
    for layer, (k, v) in enumerate(cached):
        ours_k, ours_v = decoder.keys_values(layer, inputs[layer], decoder.rotation(positions))
        torch.testing.assert_close(ours_k, k)
        torch.testing.assert_close(ours_v, v)


def test_gradients_reach_every_weight_also_under_autocast() -> None:
    drafter = build("qwen3", ((4,), (9,))).requires_grad_(True)
    token_ids, representations = random_input(drafter, 1)
    blocks = (torch.arange(NUM_TOKENS) // 3)[None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = drafter(token_ids[None], representations[None], blocks)
    assert logits.dtype == torch.bfloat16
    torch.nn.functional.cross_entropy(logits[0].float(), token_ids).backward()
    without = [n for n, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_bf16_serving_stays_near_float32() -> None:
    drafter = build("llama", ((4,), (9,)))
    token_ids, representations = random_input(drafter, 1)
    blocks = (torch.arange(NUM_TOKENS) // 3)[None]
    exact = drafter.forward_blocks(token_ids[None], representations[None], blocks)
    rounded = drafter.to(torch.bfloat16).forward_blocks(token_ids[None], representations[None].bfloat16(), blocks)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_a_drafter_that_copies_its_primary_gives_the_primarys_logits(tmp_path: Path) -> None:
    """FF_Tandem = identity on the tap that is layer j's own input: yhat is, but for its scale, what ML itself saw."""
    primary = load_decoder(make_primary(tmp_path / "primary"))
    drafter = load_drafter(make_drafter(tmp_path / "drafter", tmp_path / "primary", noise=0))
    assert isinstance(drafter, TandemDrafter)
    token_ids, positions = torch.randint(0, 288, (2, 40), generator=torch.Generator().manual_seed(1)), torch.arange(40)
    output = primary(token_ids, positions, causal_attention(primary.config, 40), drafter.taps)
    logits = drafter(token_ids, torch.stack(output.taps, -2), (positions // 5)[None])
    torch.testing.assert_close(logits, primary.logits(output.hidden), atol=2e-3, rtol=0)


def test_layer_maps() -> None:
    assert resolve_layer_map("last", 2, 8) == ((8,), (8,))
    assert resolve_layer_map("uniform", 2, 8) == ((4,), (8,))
    assert resolve_layer_map("uniform", 3, 8) == ((3,), (5,), (8,))
    assert resolve_layer_map("uniform", 4, 2) == ((1,), (1,), (2,), (2,))
    assert resolve_layer_map("0, 8", 2, 8) == ((0,), (8,))
    assert resolve_layer_map("2+8, 4+8", 2, 8) == ((2, 8), (4, 8))
    assert resolve_layer_map("2+8", 3, 8) == ((2, 8),) * 3
    assert TandemConfig(((8,), (3,), (8,)), 16, 8, "f").taps == (3, 8)


@pytest.mark.parametrize("spec", ["", "first", "4+", "4,9", "4,-1", "4,8,8", "4;8", "2+4,8"])
def test_a_layer_map_that_cannot_be_used_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="layer map"):
        resolve_layer_map(spec, 2, 8)
