"""Tiny random models in memory, for tests of training and evaluation."""

from __future__ import annotations

from tandem_serve.models.decoder import Decoder, DecoderConfig
from tandem_serve.models.tandem import TandemConfig, TandemDrafter


def small_decoder(layers: int, width: int, seed: int, window: int | None = None) -> Decoder:
    """A random decoder of 37 tokens and 64 positions, frozen."""
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
        sliding_windows=(window,) * layers,
    )
    decoder = Decoder(shape).init_weights(seed, std=0.4)
    return decoder.eval().requires_grad_(False)


def small_tandem(primary: Decoder, seed: int = 3, window: int | None = None) -> TandemDrafter:
    """A random MS of two layers that read taps 2 and 3 of a primary of three."""
    config = TandemConfig(((2,), (3,)), primary.config.hidden_size, 3, "")
    drafter = TandemDrafter(small_decoder(2, 16, seed, window), config).init_projections(seed)
    return drafter.requires_grad_(False)
