"""What a primary says of whole texts: its logits, and the representations that drafters read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_serve.models.decoder import Decoder, causal_attention


class PrimaryView(NamedTuple):
    """One pass over texts [B, T]."""

    logits: Tensor  # [B, T, V]
    representations: Tensor  # [B, T, num_taps, d_L]


def primary_view(primary: Decoder, token_ids: Tensor, taps: Sequence[int]) -> PrimaryView:
    """Runs the primary over texts from position 0. Gradients flow where its weights want them."""
    num_tokens = token_ids.shape[1]
    positions = torch.arange(num_tokens, device=token_ids.device)
    attend = causal_attention(primary.config, num_tokens, token_ids.device)
    hidden, states = primary(token_ids, positions, attend, taps)
    none = hidden.new_zeros(*hidden.shape[:2], 0, hidden.shape[-1])
    return PrimaryView(primary.logits(hidden), torch.stack(states, -2) if states else none)
