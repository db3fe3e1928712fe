"""The plainest possible KV cache, written for clarity: what faster ones are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_serve.models.decoder import Attend, DecoderConfig


class DenseCache:
    """Keys and values of one sequence: per layer [capacity, Hkv, D]. Positions are slots."""

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self._config = config
        shape = (config.num_layers, capacity, config.num_kv_heads, config.head_dim)
        self._keys, self._values = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)

    def write(self, positions: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Overwrites positions [N] with (k, v) [N, Hkv, D] of each layer."""
        for layer, (k, v) in enumerate(layers):
            self._keys[layer, positions], self._values[layer, positions] = k, v

    def attend(self, positions: Tensor) -> Attend:
        """An Attend for new tokens at positions [N], ascending and right behind what is cached (or over it)."""
        c = self._config

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._keys[layer, positions], self._values[layer, positions] = k, v
            seen = torch.arange(int(positions[-1]) + 1)
            age = positions[:, None] - seen
            window = c.sliding_windows[layer]
            visible = (age >= 0) & (age < (window or len(seen) + 1))
            group = c.num_heads // c.num_kv_heads
            keys = self._keys[layer, seen].repeat_interleave(group, 1)
            values = self._values[layer, seen].repeat_interleave(group, 1)
            scores = torch.einsum("nhd,shd->hns", q, keys) * c.head_dim**-0.5
            weights = scores.masked_fill(~visible, -torch.inf).float().softmax(-1).to(values.dtype)
            return torch.einsum("hns,shd->nhd", weights, values).flatten(1)

        return attend
