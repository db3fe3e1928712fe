"""A packed decoder computes what the plain one does, and says so when asked for what it cannot do any more."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandem_serve.models import packed
from tandem_serve.models.decoder import Decoder, DecoderConfig, causal_attention
from tandem_serve.models.packed import add_product, can_pack, pack, product

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
VARIANTS = {
    "llama": CONFIG,
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "qwen2": replace(CONFIG, attention_bias=True, output_bias=True),
    "qwen3": replace(CONFIG, qk_norm=True),
}

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this machine or build of torch has no oneDNN")


def decoder(variant: str, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(VARIANTS[variant]).init_weights(1, std=0.2).requires_grad_(False).to(dtype).eval()


def logits_of(model: Decoder, token_ids: Tensor) -> Tensor:
    positions = torch.arange(token_ids.shape[-1])
    return model.logits(model(token_ids, positions, causal_attention(model.config, token_ids.shape[-1])).hidden)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 12)])
def test_a_packed_decoder_has_the_plain_ones_logits(variant: str, shape: tuple[int, int]) -> None:
    token_ids = torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(0))
    plain, ours = decoder(variant), copy.deepcopy(decoder(variant)).pack()
    torch.testing.assert_close(logits_of(ours, token_ids), logits_of(plain, token_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_what_a_packed_drafter_caches_for_verified_positions_is_the_same(variant: str) -> None:
    plain, ours = decoder(variant), decoder(variant).pack()
    x, positions = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)), torch.arange(5)
    for expected, found in zip(
        plain.keys_values(1, x, plain.rotation(positions)),
        ours.keys_values(1, x, ours.rotation(positions)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True, params=["GenuineIntel", "another maker's"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_is_intel", lambda: request.param == "GenuineIntel")


@pytest.mark.parametrize("small", [0, 1 << 30])  # with and without a plain copy for single rows
@pytest.mark.parametrize("num_rows", [1, 2, 6, 70])
def test_products(small: int, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_SMALL", small)
    monkeypatch.setattr(packed, "_SMALL_FOR_MKL", small)
    generator = torch.Generator().manual_seed(3)
    a, x = torch.randn(num_rows, 40, generator=generator), torch.randn(num_rows, 30, generator=generator)
    matrix = torch.randn(40, 30, generator=generator)
    ours = pack(matrix)
    torch.testing.assert_close(product(a, ours), a @ matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(product(a[None], ours), (a @ matrix)[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(add_product(x, a, ours), x + a @ matrix, atol=1e-5, rtol=1e-5)


def test_small_matrices_stay_with_mkl_on_its_makers_processors() -> None:
    is_intel = packed._is_intel()
    assert isinstance(pack(torch.zeros(256, 512)), Tensor if is_intel else packed.Packed)
    assert isinstance(pack(torch.zeros(1024, 2048)), packed.Packed)


def test_bfloat16_is_packed_where_the_processor_multiplies_it() -> None:
    token_ids = torch.arange(6)[None]
    plain, ours = decoder("llama", torch.bfloat16), decoder("llama", torch.bfloat16).pack()
    torch.testing.assert_close(logits_of(ours, token_ids), logits_of(plain, token_ids), atol=0.05, rtol=0.05)


def test_packing_twice_changes_nothing_and_frees_the_parameters_once() -> None:
    ours = decoder("llama").pack()
    before = logits_of(ours, torch.arange(6)[None])
    assert torch.equal(logits_of(ours.pack(), torch.arange(6)[None]), before)
    assert {name for name, _ in ours.named_parameters() if name.endswith(("qkv", "output", "gate_up", "down"))} == set()


def test_a_packed_decoder_refuses_to_be_cast() -> None:
    with pytest.raises(RuntimeError, match="load it again"):
        decoder("llama").pack().to(torch.float64)
