"""Which tokens a step emits: the primary's choice at every row, the accepted drafts, and their log-probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import NamedTuple

import torch
from prometheus_client import Counter
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.decoding.verify import accept_prefix
from tandem_serve.engine.canonical import canonical_logits
from tandem_serve.engine.scheduler import Run
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import SamplingParams, TokenLogprob

_GREEDY = SamplingParams(temperature=0.0)


class Verified(NamedTuple):
    """What a run yields: accepted drafts, then the primary's own next token. Nothing for an early prompt chunk."""

    num_accepted_tokens: int
    token_ids: list[int]


_NOTHING = Verified(0, [])


class TokenChooser:
    """The primary's choice at every row, and what it makes of drafts. Rows within tie_margin of a tie: canonical.py."""

    def __init__(self, decoder: Decoder, tie_margin: float, near_ties: Counter) -> None:
        self._decoder = decoder
        self._tie_margin = tie_margin
        self._near_ties = near_ties

    def verify(self, runs: Seq[Run], logits: Tensor) -> list[Verified]:
        """Chooses at each run's rows of logits [R, V] and keeps its longest right prefix of drafts.

        A run's first row follows its sequence's last token, each further one a draft. Rows of near ties are replaced in
        `logits` by the canonical ones, in order and only as far as they matter.
        """
        blocks = [run for run in runs if run.num_logits]
        if not blocks:
            return [_NOTHING] * len(runs)
        choice = choose_token_ids(logits, _sampling_rows(blocks, logits.device))
        ends = list(itertools.accumulate(block.num_logits for block in blocks))
        flat = choice.token_ids.tolist()
        targets = [flat[end - block.num_logits : end] for block, end in zip(blocks, ends, strict=True)]
        if self._tie_margin > 0 and min(margins := choice.margins.tolist()) < self._tie_margin:
            for block, end, own in zip(blocks, ends, targets, strict=True):
                rows = slice(end - block.num_logits, end)
                self._settle_near_ties(block, logits[rows], own, margins[rows])
        width = max(block.num_logits for block in blocks)
        verdict = accept_prefix(
            torch.tensor([_padded(block.draft_token_ids, width - 1) for block in blocks], dtype=torch.int64),
            torch.tensor([_padded(own, width) for own in targets]),
        )
        verified = (
            Verified(num_accepted, [*block.draft_token_ids[:num_accepted], next_token_id])
            for block, num_accepted, next_token_id in zip(blocks, *(part.tolist() for part in verdict), strict=True)
        )
        return [next(verified) if run.num_logits else _NOTHING for run in runs]

    def _settle_near_ties(self, block: Run, logits: Tensor, targets: list[int], margins: list[float]) -> None:
        """Replaces a block's near-tied logits [G + 1, V] and targets, in place, up to its first rejection."""
        sequence, drafts = block.sequence, block.draft_token_ids
        for index in range(len(drafts) + 1):
            if margins[index] < self._tie_margin:
                self._near_ties.inc()
                context = [*sequence.token_ids, *drafts[:index]]
                logits[index] = canonical_logits(self._decoder, context)[0]
                rows = SamplingRows.from_params([(sequence.request.sampling, len(context))], logits.device)
                targets[index] = int(choose_token_ids(logits[index : index + 1], rows).token_ids)
            if index < len(drafts) and drafts[index] != targets[index]:
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


def _sampling_rows(blocks: Seq[Run], device: torch.device) -> SamplingRows:
    if all(block.sequence.request.sampling.temperature == 0 for block in blocks):
        return _greedy_rows(sum(block.num_logits for block in blocks))
    rows = [
        (block.sequence.request.sampling, len(block.sequence.token_ids) + index)
        for block in blocks
        for index in range(block.num_logits)
    ]
    return SamplingRows.from_params(rows, device)


@lru_cache(maxsize=256)
def _greedy_rows(num_rows: int) -> SamplingRows:
    """Greedy choice asks for nothing but the number of rows, so the record is made once a number."""
    return SamplingRows.from_params([(_GREEDY, 0)] * num_rows)


def _padded(token_ids: Seq[int], width: int) -> list[int]:
    return [*token_ids, *(-1,) * (width - len(token_ids))]
