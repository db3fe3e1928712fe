"""Memory for keys and values: one contiguous buffer a sequence, counted against one budget.

Contiguous rather than paged: a buffer is reserved for the whole sequence at admission, so there is nothing to move or
evict later, and attention reads it in place. What paging would save, shared prefixes and unused max_tokens, is the vLLM
engine's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_serve.models.decoder import DecoderConfig


class KvBudget:
    """Counts tokens of KV memory. Reserve before you allocate, and memory never runs out.

    Not thread-safe: it belongs to one engine's thread.
    """

    def __init__(self, capacity_tokens: int, kv_block_size: int) -> None:
        self.kv_block_size = kv_block_size
        self.capacity_tokens = capacity_tokens - capacity_tokens % kv_block_size
        self.reserved_tokens = 0

    def round_up(self, num_tokens: int) -> int:
        """num_tokens in whole blocks."""
        return -(-num_tokens // self.kv_block_size) * self.kv_block_size

    def try_reserve(self, num_tokens: int) -> bool:
        """Takes num_tokens (a multiple of kv_block_size) where that many are left."""
        if self.reserved_tokens + num_tokens > self.capacity_tokens:
            return False
        self.reserved_tokens += num_tokens
        return True

    def release(self, num_tokens: int) -> None:
        """Gives back what was reserved."""
        self.reserved_tokens -= num_tokens

    @property
    def usage(self) -> float:
        """Share reserved, 0..1 (vLLM: kv_cache_usage_perc)."""
        return self.reserved_tokens / max(self.capacity_tokens, 1)


class KvBuffer:
    """Keys and values of one sequence in all layers, position p at index p.

    `planes` [2 * L, Hkv, capacity, D] holds layer l's keys at 2l and values at 2l + 1. Head before position: each
    head's keys are contiguous, which the CPU's attention kernel reads up to twice as fast. Contents beyond what has
    been written are undefined; readers take only positions that they know of.
    """

    __slots__ = ("planes",)

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (2 * config.num_layers, config.num_kv_heads, capacity, config.head_dim)
        self.planes = torch.empty(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.planes.shape[2]

    def views(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Positions start .. end - 1 of every plane, 2 * L views [Hkv, end - start, D]."""
        return self.planes[:, :, start:end].unbind(0)

    def write(self, start: int, layers: list[tuple[Tensor, Tensor]], rows: slice) -> None:
        """Stores rows of each layer's k and v [N, Hkv, D] at positions start and on."""
        views = self.views(start, start + rows.stop - rows.start)
        for layer, (k, v) in enumerate(layers):
            views[2 * layer].copy_(k[rows].transpose(0, 1))
            views[2 * layer + 1].copy_(v[rows].transpose(0, 1))

    def grow(self, capacity: int, num_written: int) -> None:
        """Enlarges the buffer, keeping positions below num_written."""
        old = self.planes
        self.planes = old.new_empty((old.shape[0], old.shape[1], capacity, old.shape[3]))
        self.planes[:, :, :num_written] = old[:, :, :num_written]
