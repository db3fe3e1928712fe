"""The referee for near ties: logits that are a function of the tokens alone.

Floating-point sums come out differently when a position is computed alone, beside drafts, in another prompt chunk or
among other sequences: about 1e-5 in float32. That changes no token unless the two best ones are about as close. Then,
and only then, the position is computed once more in one fixed way, so that speculative, plain, batched and restarted
runs choose the same token: "lossless" to the last one, not only in distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tandem_serve.models.decoder import Decoder, causal_attention


def canonical_logits(decoder: Decoder, token_ids: Sequence[int]) -> Tensor:
    """Logits [1, V] float32 after token_ids, in one pass over the whole sequence, alone and without a cache.

    Costs a prefill of the sequence so far; in float32 about one token in several thousand needs it.
    """
    inputs = torch.tensor([token_ids], device=decoder.device)
    positions = torch.arange(len(token_ids), device=decoder.device)
    attend = causal_attention(decoder.config, len(token_ids), decoder.device)
    hidden, _ = decoder(inputs, positions, attend)
    return decoder.logits(hidden[0, -1:]).float()
