"""Drafting ahead: while a block is being verified, MS drafts what may come after it.

The primary will keep some i of a block's G drafts and choose the next token itself. Where i < G that token is not
draft i + 1, so the best guess is MS's next best there; where i = G, MS's best. Each of these G + 1 *endings* gets a
block of its own. They share their past and differ in their last tokens only, so one batch drafts them all: a tree of
G + 1 branches.

If the verdict is one of the endings, its block is there already, and the round costs no drafting. Drafts are guesses
either way: the text does not change. Shape letters: R = G + 1 endings, H heads, Hkv key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import SamplingParams

MAX_DRAFTS = 8  # a longer block has too many endings


class OpenBlock(NamedTuple):
    """A block that the primary is verifying: `token_ids` are the token that opens it, then its drafts."""

    kv: KvBuffer
    start: int  # position of the opening token: so many are verified
    token_ids: tuple[int, ...]
    sampling: SamplingParams

    @property
    def num_positions(self) -> int:
        """Buffer places that drafting ahead needs: the block, and a place for each ending's token of each pass."""
        num_endings = len(self.token_ids)
        return self.start + num_endings + num_endings * (num_endings - 1)

    @property
    def last_position(self) -> int:
        """The last position that MS runs: the last draft but one behind the longest ending."""
        return self.start + 2 * len(self.token_ids) - 2


class DraftsAhead:
    """What a drafter engine drafts ahead, for all of its sequences, while it has nothing else to do."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._in_work: dict[object, DraftAhead] = {}  # oldest first
        self._done: dict[object, DraftAhead] = {}

    def begin(self, sequence: object, block: OpenBlock) -> None:
        """From now on `advance` works on what may follow that block."""
        self._in_work[sequence] = DraftAhead(self._decoder, block)

    def advance(self) -> bool:
        """One pass for the sequence that has waited longest. False: there is nothing to draft."""
        sequence = next(iter(self._in_work), None)
        if sequence is None:
            return False
        ahead = self._in_work[sequence]
        ahead.advance()
        if ahead.is_done:
            self._done[sequence] = self._in_work.pop(sequence)
        return True

    def take(self, sequence: object) -> DraftAhead | None:
        """What there is for a sequence, done or not. Its places in the buffer are free then."""
        unfinished = self._in_work.pop(sequence, None)
        return self._done.pop(sequence, unfinished)

    def clear(self) -> None:
        self._in_work.clear()
        self._done.clear()


class DraftAhead:
    """The blocks after one open block, as long as it is, one pass of MS at a time.

    The buffer's places behind the verified positions are this object's until more positions are verified: the block
    itself lies at its positions, the branches behind it, pass by pass. Nothing there outlives the next round.
    """

    def __init__(self, decoder: Decoder, block: OpenBlock) -> None:
        self._decoder = decoder
        self._block = block
        self._num_drafts = len(block.token_ids) - 1
        self._chosen: list[Tensor] = []  # [R] each: the endings, then their drafts
        self._drafts_by_ending: dict[tuple[int, ...], tuple[int, ...]] | None = None
        self._rows: SamplingRows | None = None

    @property
    def is_done(self) -> bool:
        return len(self._chosen) > self._num_drafts

    def advance(self) -> None:
        """One pass."""
        if self._rows is None:
            self._choose_endings()
        else:
            self._draft(self._rows)

    def drafts_after(self, start: int, token_ids: Sequence[int], next_token_id: int) -> tuple[int, ...] | None:
        """The block that follows verified token_ids at positions start and on, then next_token_id. None: no luck."""
        if not self.is_done or start != self._block.start:
            return None
        if self._drafts_by_ending is None:
            self._drafts_by_ending = self._by_ending()
        return self._drafts_by_ending.get((*token_ids, next_token_id))

    def _by_ending(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        branches = torch.stack(self._chosen, 1).tolist()
        tokens = self._block.token_ids
        return {(*tokens[: i + 1], ending): tuple(drafts) for i, (ending, *drafts) in enumerate(branches)}

    def _choose_endings(self) -> None:
        """Runs the block itself, at its own positions."""
        block, device = self._block, self._decoder.device
        logits = forward(self._decoder, [Rows(block.kv, block.start, block.token_ids, len(block.token_ids))]).logits
        drafts = torch.tensor(block.token_ids[1:], device=device)
        logits[:-1].scatter_(1, drafts[:, None], -torch.inf)  # a draft that is kept is not where its block ends
        first = block.start + 1
        positions = range(first, first + len(block.token_ids))
        self._rows = SamplingRows.from_params([(block.sampling, position) for position in positions], device)
        self._chosen.append(choose_token_ids(logits, self._rows).token_ids)

    def _draft(self, rows: SamplingRows) -> None:
        """Runs every branch's latest token."""
        depth, num_endings = len(self._chosen) - 1, len(self._block.token_ids)
        attend = _BranchAttention(self._decoder, self._block, depth)
        positions = torch.arange(num_endings, device=self._decoder.device) + (self._block.start + 1 + depth)
        hidden, _ = self._decoder(self._chosen[-1], positions, attend)
        self._rows = rows.advanced()
        logits = self._decoder.logits(hidden).float()
        self._chosen.append(choose_token_ids(logits, self._rows).token_ids)


class _BranchAttention:
    """An Attend over one token of each branch: it sees the verified positions, the block up to where its branch leaves
    it, and its own branch. Good for one pass."""

    def __init__(self, decoder: Decoder, block: OpenBlock, depth: int) -> None:
        start, num_endings = block.start, len(block.token_ids)
        self._first = start + num_endings * (1 + depth)
        self._end = self._first + num_endings
        self._planes = block.kv.planes
        self._windows = decoder.config.sliding_windows
        self._grouped = decoder.config.num_heads != decoder.config.num_kv_heads
        branch = torch.arange(num_endings, device=decoder.device)
        places = torch.arange(self._end, device=decoder.device)
        behind = places - start - num_endings  # of the branches' places: pass by pass, a place for each branch
        owner, age = behind % num_endings, depth - behind // num_endings
        on_branch = (behind >= 0) & (owner == branch[:, None])
        before = places <= start + branch[:, None]  # verified, or in the block before the branch leaves it
        self._distance = torch.where(before, start + 1 + branch[:, None] + depth - places, age)
        self._is_seen = before & (behind < 0) | on_branch
        self._masks = {window: self._mask(window) for window in set(self._windows)}

    def _mask(self, window: int | None) -> Tensor:
        return self._is_seen if window is None else self._is_seen & (self._distance < window)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, D], k and v [R, Hkv, D], rotated -> [R, H * D]."""
        keys, values = self._planes[2 * layer], self._planes[2 * layer + 1]
        keys[:, self._first : self._end] = k.transpose(0, 1)
        values[:, self._first : self._end] = v.transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys[None, :, : self._end],
            values[None, :, : self._end],
            attn_mask=self._masks[self._windows[layer]],
            enable_gqa=self._grouped,
        )
        return mixed.squeeze(0).transpose(0, 1).flatten(-2)
