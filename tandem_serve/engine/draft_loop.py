"""Drafting itself: MS runs token by token, all sequences of all primaries in one batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.decoding.stopping_rules import UNTRAINED, Scorer, Stopping, TextOdds
from tandem_serve.engine.attention import RaggedAttention, Span
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import SamplingParams, StoppingRule


class DraftJob(NamedTuple):
    """A block to draft: MS first runs token_ids at positions start and on; the last of them opens the block."""

    kv: KvBuffer
    start: int
    token_ids: list[int]
    block_length: int  # 1 or more
    sampling: SamplingParams
    stopping: StoppingRule | None = None
    odds: TextOdds | None = None  # of its text

    @property
    def first_position(self) -> int:
        """Position of the first draft."""
        return self.start + len(self.token_ids)


def draft_blocks(decoder: Decoder, jobs: Seq[DraftJob], scorer: Scorer = UNTRAINED) -> list[list[int]]:
    """Each job's drafts: block_length of them, or fewer where its stopping rule ends the block.

    A sequence leaves the batch when its block is done. The last draft of a block is not run: if it proves right, its
    position is written with the rest of the verified ones.
    """
    device = decoder.device
    lanes = list(range(len(jobs)))  # the jobs that are still drafted, in the batch's order
    logits = forward(decoder, [Rows(job.kv, job.start, job.token_ids, 1) for job in jobs]).logits
    positions = torch.tensor([job.first_position - 1 for job in jobs], device=device)
    rows = _sampling_rows(jobs, 0, device)
    stopping = Stopping([job.stopping for job in jobs], scorer.thresholds, [job.odds for job in jobs])
    columns: list[tuple[list[int], Tensor]] = []  # of each step: lanes and drafts
    dropped: set[int] = set()  # lanes whose last draft is not worth verifying
    for step in range(1, max(job.block_length for job in jobs) + 1):
        choice = choose_token_ids(logits, rows)
        chosen = choice.token_ids
        columns.append((lanes, chosen))
        going = [jobs[lane].block_length > step for lane in lanes]
        if stopping and any(going):
            going = stopping.judge(lanes, going, scorer, logits, choice)
            dropped |= {
                lane for lane, goes in zip(lanes, going, strict=True) if not goes and not stopping.is_kept(lane)
            }
        if not any(going):
            break
        if all(going):
            rows = rows.advanced()
        else:
            staying = torch.tensor([place for place, goes in enumerate(going) if goes], device=device)
            lanes = [lane for lane, goes in zip(lanes, going, strict=True) if goes]
            chosen, positions = chosen[staying], positions[staying]
            rows = _sampling_rows([jobs[lane] for lane in lanes], step, device)
        spans = [Span(jobs[lane].kv, jobs[lane].first_position + step - 1, 1) for lane in lanes]
        attend = RaggedAttention(decoder.config, spans, decoder.dtype)
        logits = decoder.logits(decoder(chosen, positions + step, attend).hidden).float()
    blocks: list[list[int]] = [[] for _ in jobs]
    for members, drafts in columns:  # fetched at the end: without a rule, no step waits for the device
        for lane, draft in zip(members, drafts.tolist(), strict=True):
            blocks[lane].append(draft)
    for lane, job in enumerate(jobs):
        if job.odds is not None:
            job.odds.expect(job.first_position, blocks[lane], stopping.draft_scores(lane))
    return [block[:-1] if lane in dropped else block for lane, block in enumerate(blocks)]


def _sampling_rows(jobs: Seq[DraftJob], step: int, device: torch.device) -> SamplingRows:
    """How the drafts that follow `step` earlier ones are chosen."""
    return SamplingRows.from_params([(job.sampling, job.first_position + step) for job in jobs], device)
