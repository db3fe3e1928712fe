"""Representations of cached prompt prefixes: vLLM does not run those positions again, and a drafter must see them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class PrefixRepresentations:
    """The taps of whole KV blocks by vLLM's block hash, least recently used first. Host memory, bounded.

    A block hash covers all tokens up to the block's end, so equal hashes mean equal representations. What is missing
    costs a sequence its drafts, never a token.
    """

    def __init__(self, block_size: int, limit_bytes: int) -> None:
        self.block_size = block_size
        self.num_bytes = 0
        self._limit_bytes = limit_bytes
        self._blocks: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __contains__(self, block_hash: Hashable) -> bool:
        return block_hash in self._blocks

    def put(self, block_hash: Hashable, block: Tensor) -> None:
        """Keeps a block [block_size, num_taps, d_L], in memory of its own, and forgets old ones beyond the limit."""
        if block_hash in self._blocks:
            self._blocks.move_to_end(block_hash)
            return
        self._blocks[block_hash] = block
        self.num_bytes += block.nbytes
        while self.num_bytes > self._limit_bytes:
            self.num_bytes -= self._blocks.popitem(last=False)[1].nbytes

    def read(self, block_hashes: Sequence[Hashable], start: int, end: int) -> Tensor | None:
        """Positions start .. end - 1 of the sequence with these hashes, None where any lacks."""
        first, last = start // self.block_size, -(-end // self.block_size)
        if last > len(block_hashes) or not all(key in self._blocks for key in block_hashes[first:last]):
            return None
        for key in block_hashes[first:last]:
            self._blocks.move_to_end(key)
        offset = first * self.block_size
        return torch.cat([self._blocks[key] for key in block_hashes[first:last]])[start - offset : end - offset]
