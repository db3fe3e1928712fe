"""Texts that a primary writes by itself: to measure drafters on, and to train them on."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.models.decoder import Decoder, masked_attention
from tandem_serve.types import SamplingParams


@torch.inference_mode()
def continuations(
    decoder: Decoder, prompts: Tensor, num_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """Continues prompts of equal length: [B, P] int64 -> [B, P + num_tokens], prompts included.

    Greedy at temperature 0, else sampled as serving samples, row r with seed + r. Goes on past an end-of-text token, as
    the training stream does. A plain contiguous cache; serving has the paged one.
    """
    batch, prompt_length = prompts.shape
    c, total = decoder.config, prompts.shape[1] + num_tokens
    shape = (c.num_layers, batch, total, c.num_kv_heads, c.head_dim)
    keys = torch.zeros(shape, dtype=decoder.dtype, device=prompts.device)
    values = torch.zeros_like(keys)
    rows = SamplingRows.from_params(
        [(SamplingParams(temperature, seed=seed + row), prompt_length) for row in range(batch)], prompts.device
    )
    token_ids = torch.cat((prompts, prompts.new_zeros(batch, num_tokens)), 1)
    all_positions = torch.arange(total, device=prompts.device)

    def extend(first: int, end: int) -> Tensor:
        """Runs positions first..end-1 and returns the last one's logits [B, V]."""
        positions = all_positions[first:end]
        age = positions[:, None] - all_positions[:end]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[layer, :, first:end], values[layer, :, first:end] = k, v
            window = c.sliding_windows[layer]
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            return masked_attention(q, keys[layer, :, :end], values[layer, :, :end], seen)

        return decoder.logits(decoder(token_ids[:, first:end], positions, attend).hidden[:, -1])

    logits = extend(0, prompt_length)
    for position in range(prompt_length, total):
        token_ids[:, position] = choose_token_ids(logits.float(), rows).token_ids
        rows = rows.advanced()
        if position + 1 < total:
            logits = extend(position, position + 1)
    return token_ids
