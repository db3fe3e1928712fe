"""The decoder's own promises; its numbers are compared with transformers' in tests/contract."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tandem_serve.errors import CheckpointError
from tandem_serve.models.decoder import (
    Decoder,
    DecoderConfig,
    attention_by_chunks,
    causal_attention,
    masked_attention,
)
from tandem_serve.models.inflate import inflate
from tandem_serve.models.norm import RmsNorm
from tandem_serve.models.rope import RopeConfig, rope_table, rotate

CONFIG = DecoderConfig(
    vocab_size=67,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=40,
)
TOKENS = torch.randint(0, 67, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(12)


def logits_of(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(TOKENS, POSITIONS, causal_attention(decoder.config, 12)).hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_rms_norm_is_torchs(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 3, 16, generator=generator) * scale).to(dtype)
    weight = torch.rand(16, generator=generator).to(dtype)
    tolerance = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2e-2}
    torch.testing.assert_close(RmsNorm(16, 1e-5)(x, weight), F.rms_norm(x, (16,), weight, 1e-5), **tolerance)
    torch.testing.assert_close(RmsNorm(16, 1e-5)(x), F.rms_norm(x, (16,), None, 1e-5), **tolerance)


def test_rms_norm_has_torchs_gradient() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 16, requires_grad=True)
    target = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((RmsNorm(16, 1e-5)(x, weight) * target).sum(), (x, weight))
    theirs = torch.autograd.grad((F.rms_norm(x, (16,), weight, 1e-5) * target).sum(), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rope_turns_pairs_by_position_so_that_scores_depend_on_distance_alone() -> None:
    cos, sin = rope_table(RopeConfig(), 6, 40).view(40, 2, 1, 6).unbind(1)
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 6, generator=generator), torch.randn(1, 1, 6, generator=generator)

    def score(query_position: int, key_position: int) -> float:
        i, j = torch.tensor([query_position]), torch.tensor([key_position])
        return float((rotate(q, cos[i], sin[i]) * rotate(k, cos[j], sin[j])).sum())

    assert score(7, 3) == pytest.approx(score(36, 32), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    torch.testing.assert_close(rotate(q, cos[:1], sin[:1]), q)


def test_flat_ragged_tokens_and_batches_give_the_same() -> None:
    decoder = Decoder(CONFIG).init_weights(1, std=0.3)
    batched = decoder(TOKENS, POSITIONS, causal_attention(CONFIG, 12), taps=(3, 1))

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(0, (2, 12)) for t in (q, k, v))
        return causal_attention(CONFIG, 12)(layer, q, k, v).flatten(0, 1)

    flat = decoder(TOKENS.flatten(), POSITIONS.repeat(2), attend, taps=(3, 1))
    torch.testing.assert_close(flat.hidden, batched.hidden.flatten(0, 1))
    for a, b in zip(flat.taps, batched.taps, strict=True):
        torch.testing.assert_close(a, b.flatten(0, 1))


def test_taps_come_raw_and_in_the_order_asked() -> None:
    decoder = Decoder(CONFIG).init_weights(1, std=0.3)
    attend = causal_attention(CONFIG, 12)
    last, embedding, again = decoder(TOKENS, POSITIONS, attend, taps=(3, 0, 3)).taps
    assert last is again
    assert torch.equal(embedding, decoder.embed(TOKENS))
    hidden = decoder(TOKENS, POSITIONS, attend).hidden
    torch.testing.assert_close(F.rms_norm(last, (16,), decoder.norm, 1e-6), hidden)


def test_a_changed_dtype_rounds_no_position() -> None:
    decoder = Decoder(CONFIG).init_weights(1)
    table = decoder.rope.clone()
    decoder.to(torch.bfloat16)
    assert decoder.rope.dtype == torch.bfloat16
    assert torch.equal(decoder.to(torch.float32).rope, table)


def test_copies_and_replaced_weights_are_the_ones_computed_with() -> None:
    decoder = Decoder(CONFIG).init_weights(1, std=0.3)
    twin, before = copy.deepcopy(decoder), logits_of(decoder)
    other = Decoder(CONFIG).init_weights(2, std=0.3)
    twin.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits_of(twin), logits_of(other))
    assert torch.equal(logits_of(decoder), before)


def test_random_weights_depend_on_the_seed_alone() -> None:
    assert torch.equal(logits_of(Decoder(CONFIG).init_weights(1)), logits_of(Decoder(CONFIG).init_weights(1)))
    assert not torch.equal(logits_of(Decoder(CONFIG).init_weights(1)), logits_of(Decoder(CONFIG).init_weights(2)))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("times", [1, 2, 8])
def test_inflated_it_computes_the_same_from_times_as_many_weights(model_type: str, times: int) -> None:
    config = replace(
        CONFIG,
        model_type=model_type,
        attention_bias=model_type in ("qwen2", "qwen3"),
        output_bias=model_type == "qwen3",
        qk_norm=model_type == "qwen3",
        sliding_windows=(4, 4, 4) if model_type == "mistral" else (),
        tie_word_embeddings=model_type == "qwen2",
    )
    decoder = Decoder(config).init_weights(1, std=0.3)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    inflated = inflate(decoder, times)
    assert torch.equal(logits_of(inflated), logits_of(decoder))
    taps = (0, 1, 2, 3)
    ours = inflated(TOKENS, POSITIONS, causal_attention(inflated.config, 12), taps).taps
    theirs = decoder(TOKENS, POSITIONS, causal_attention(config, 12), taps).taps
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def read_per_token(model: Decoder) -> int:
        return sum(p.numel() for p in model.layers.parameters()) + config.vocab_size * config.hidden_size

    half_a_layer = sum(p.numel() for p in decoder.layers[0].parameters()) / 2
    assert abs(read_per_token(inflated) - times * read_per_token(decoder)) <= half_a_layer
    storages = {p.data_ptr() for p in inflated.parameters()} | {p.data_ptr() for p in decoder.parameters()}
    assert len(storages) == len(list(inflated.parameters())) + len(list(decoder.parameters()))


def test_nothing_is_inflated_to_less_than_itself() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        inflate(Decoder(CONFIG).init_weights(), 0)


def test_a_config_that_contradicts_itself_is_refused() -> None:
    for change, message in (
        ({"num_kv_heads": 3}, "share"),
        ({"head_dim": 5}, "odd"),
        ({"sliding_windows": (4,)}, "windows"),
        ({"max_position_embeddings": 1 << 40}, "too large"),
    ):
        with pytest.raises(CheckpointError, match=message):
            replace(CONFIG, **change)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [40, 300])  # within a chunk of queries, and over three
def test_attention_by_chunks_is_causal_attention(num_tokens: int, num_kv_heads: int) -> None:
    """What a compiled training step runs on a CPU, here without the compiler."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, num_tokens, heads, 6, generator=generator) for heads in (4, num_kv_heads, num_kv_heads)]
    q, k, v = (part.requires_grad_() for part in inputs)
    expected, found = masked_attention(q, k, v, None), attention_by_chunks(q, k, v)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
