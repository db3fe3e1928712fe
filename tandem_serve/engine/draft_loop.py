"""Drafting itself: MS runs token by token, all sequences of all primaries in one batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.attention import RaggedAttention, Span
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import SamplingParams


class DraftJob(NamedTuple):
    """A block to draft: MS first runs token_ids at positions start and on; the last of them opens the block."""

    kv: KvBuffer
    start: int
    token_ids: list[int]
    block_length: int  # 1 or more
    sampling: SamplingParams

    @property
    def first_position(self) -> int:
        """Position of the first draft."""
        return self.start + len(self.token_ids)


def draft_blocks(decoder: Decoder, jobs: Seq[DraftJob]) -> list[list[int]]:
    """Each job's drafts, block_length of them, in as many passes as the longest block has drafts.

    A sequence leaves the batch when its block is done. The last draft of a block is not run: if it proves right, its
    position is written with the rest of the verified ones.
    """
    order = sorted(range(len(jobs)), key=lambda index: -jobs[index].block_length)
    ordered = [jobs[index] for index in order]
    active = ordered
    logits = forward(decoder, [Rows(job.kv, job.start, job.token_ids, 1) for job in active]).logits
    positions = torch.tensor([job.first_position - 1 for job in active], device=decoder.device)
    rows = _sampling_rows(active, 0, decoder.device)
    chosen = [_choose(logits, rows)]
    for step in range(1, ordered[0].block_length):
        rows = rows.advanced()
        if active[-1].block_length <= step:
            active = [job for job in active if job.block_length > step]
            rows = _sampling_rows(active, step, decoder.device)
        spans = [Span(job.kv, job.first_position + step - 1, 1) for job in active]
        attend = RaggedAttention(decoder.config, spans, decoder.dtype)
        hidden, _ = decoder(chosen[-1][: len(active)], positions[: len(active)] + step, attend)
        chosen.append(_choose(decoder.logits(hidden), rows))
    columns = [column.tolist() for column in chosen]  # fetched at the end: a step never waits for the device
    blocks: list[list[int]] = [[] for _ in jobs]
    for rank, index in enumerate(order):
        blocks[index] = [columns[step][rank] for step in range(jobs[index].block_length)]
    return blocks


def _sampling_rows(jobs: Seq[DraftJob], step: int, device: torch.device) -> SamplingRows:
    """How the drafts that follow `step` earlier ones are chosen."""
    return SamplingRows.from_params([(job.sampling, job.first_position + step) for job in jobs], device)


def _choose(logits: Tensor, rows: SamplingRows) -> Tensor:
    """One draft a row [B]."""
    return choose_token_ids(logits.float(), rows).token_ids
