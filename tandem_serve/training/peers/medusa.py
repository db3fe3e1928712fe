"""MEDUSA heads (arXiv 2401.10774): draft s of a block from the primary's last hidden state alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem_serve.models.decoder import Decoder
from tandem_serve.models.norm import RmsNorm
from tandem_serve.training.peers.peer import Peer, shifted


class Medusa(Peer):
    """Head s is a residual block h + silu(h W_s) under the primary's own norm and output head, W_s zero at first.

    All heads read the state of the last verified position. (The paper gives each head an output matrix of its own,
    which at a small width would be most of the model.) Drafts past the last head use the last head.
    """

    kind = "medusa"

    def __init__(self, primary: Decoder, num_heads: int) -> None:
        super().__init__()
        c = primary.config
        self.taps = (c.num_layers,)
        self.num_training_steps = num_heads
        self.heads = nn.Parameter(torch.zeros(num_heads, c.hidden_size, c.hidden_size, device=primary.device))
        norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self._normalise: Callable[[Tensor], Tensor] = lambda x: norm(x, primary.norm)
        self._logits: Callable[[Tensor], Tensor] = primary.logits

    def settings(self) -> dict[str, Any]:
        return {"num_heads": self.heads.shape[0]}

    def unroll(self, token_ids: Tensor, representations: Tensor, num_steps: int) -> Iterator[Tensor]:
        states = self._normalise(representations[..., 0, :])
        for step in range(num_steps):
            h = shifted(states, step + 1)  # a block that opens at n has seen the primary's state of n - 1
            yield self._logits(h + F.silu(h @ self.heads[min(step, len(self.heads) - 1)]))
