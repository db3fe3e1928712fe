"""Which tokens a step emits: the primary's choice at every row, the accepted drafts, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.decoding.verify import accept_prefix
from tandem_serve.engine.canonical import canonical_logits
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import SamplingParams, TokenLogprob

_GREEDY = SamplingParams(temperature=0.0)


class Block(NamedTuple):
    """Drafts to verify, in one sequence. Its rows of logits are len(draft_token_ids) + 1, from `row` on.

    Row `row` follows the last of token_ids, row `row + i` the i-th draft.
    """

    token_ids: list[int]  # all tokens of the sequence
    draft_token_ids: tuple[int, ...]
    sampling: SamplingParams
    row: int


class Verified(NamedTuple):
    """A block's outcome: token_ids are the accepted drafts and the primary's own next token."""

    num_accepted_tokens: int
    token_ids: list[int]


class TokenChooser:
    """Verifies blocks. `num_near_ties` counts the rows that were computed a second time (canonical.py)."""

    def __init__(self, decoder: Decoder, tie_margin: float) -> None:
        self._decoder = decoder
        self._tie_margin = tie_margin
        self.num_near_ties = 0

    def verify(self, blocks: Seq[Block], logits: Tensor) -> list[Verified]:
        """Chooses at every row of logits [R, V] and keeps each block's longest right prefix.

        Rows of near ties are replaced in `logits` by the canonical ones, in order and only as far as they matter.
        """
        choice = choose_token_ids(logits, _sampling_rows(blocks))
        targets = choice.token_ids.tolist()
        if self._tie_margin > 0:
            margins = choice.margins.tolist()
            if min(margins) < self._tie_margin:
                self._settle_near_ties(blocks, logits, targets, margins)
        width = max(len(block.draft_token_ids) for block in blocks)
        verdict = accept_prefix(
            torch.tensor([_padded(block.draft_token_ids, width) for block in blocks], dtype=torch.int64),
            torch.tensor([_padded(targets[b.row : b.row + len(b.draft_token_ids) + 1], width + 1) for b in blocks]),
        )
        return [
            Verified(num_accepted, [*block.draft_token_ids[:num_accepted], next_token_id])
            for block, num_accepted, next_token_id in zip(blocks, *(part.tolist() for part in verdict), strict=True)
        ]

    def _settle_near_ties(self, blocks: Seq[Block], logits: Tensor, targets: list[int], margins: list[float]) -> None:
        """Replaces near-tied targets, in place, up to each block's first rejection."""
        for block in blocks:
            for index in range(len(block.draft_token_ids) + 1):
                row = block.row + index
                if margins[row] < self._tie_margin:
                    self.num_near_ties += 1
                    context = [*block.token_ids, *block.draft_token_ids[:index]]
                    logits[row] = canonical_logits(self._decoder, context)[0]
                    rows = SamplingRows.from_params([(block.sampling, len(context))], logits.device)
                    targets[row] = int(choose_token_ids(logits[row : row + 1], rows).token_ids)
                if index < len(block.draft_token_ids) and block.draft_token_ids[index] != targets[row]:
                    break


def token_logprobs(logits: Tensor, token_ids: Seq[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of token_ids [n] and of the num_top likeliest ids, under the plain softmax of logits [n, V]."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs[torch.arange(len(token_ids)), list(token_ids)].tolist()
    best = logprobs.topk(min(num_top, logits.shape[-1]), -1)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(
        TokenLogprob(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids, chosen, tops, strict=True)
    )


def _sampling_rows(blocks: Seq[Block]) -> SamplingRows:
    rows = [
        (block.sampling, len(block.token_ids) + index)
        for block in blocks
        for index in range(len(block.draft_token_ids) + 1)
    ]
    if all(sampling.temperature == 0 for sampling, _ in rows):
        return _greedy_rows(len(rows))
    return SamplingRows.from_params(rows)


@lru_cache(maxsize=256)
def _greedy_rows(num_rows: int) -> SamplingRows:
    """Greedy choice asks for nothing but the number of rows, so the record is made once a number."""
    return SamplingRows.from_params([(_GREEDY, 0)] * num_rows)


def _padded(token_ids: Seq[int], width: int) -> list[int]:
    return [*token_ids, *(-1,) * (width - len(token_ids))]
