"""One forward pass over everything that runs in a step: a flat batch of prompt chunks and blocks to verify."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_serve.engine.attention import RaggedAttention, Span
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.decoder import Decoder


class Rows(NamedTuple):
    """One sequence's tokens in a batch: token_ids at positions start and on, of which the last need logits."""

    kv: KvBuffer
    start: int
    token_ids: Seq[int]
    num_logits: int


class ForwardOutput(NamedTuple):
    """logits [R, V] float32: each run's needed rows, one run after another. taps [N, num_taps, d_L] on the CPU."""

    logits: Tensor
    taps: Tensor | None


def forward(decoder: Decoder, rows: Seq[Rows], taps: tuple[int, ...] = ()) -> ForwardOutput:
    """Runs the rows through all layers, writing their keys and values. The head runs on the needed rows alone."""
    token_ids = [token_id for row in rows for token_id in row.token_ids]
    positions = [p for row in rows for p in range(row.start, row.start + len(row.token_ids))]
    spans = [Span(row.kv, row.start, len(row.token_ids)) for row in rows]
    inputs = torch.tensor([token_ids, positions], device=decoder.device)
    attend = RaggedAttention(decoder.config, spans, decoder.dtype)
    hidden, states = decoder(inputs[0], inputs[1], attend, taps)
    if any(row.num_logits < len(row.token_ids) for row in rows):
        hidden = hidden[torch.tensor(_logit_rows(rows), dtype=torch.int64, device=decoder.device)]
    logits = decoder.logits(hidden).float()
    return ForwardOutput(logits, torch.stack(states, 1).cpu() if taps else None)


def _logit_rows(rows: Seq[Rows]) -> list[int]:
    numbers: list[int] = []
    end = 0
    for row in rows:
        end += len(row.token_ids)
        numbers += range(end - row.num_logits, end)
    return numbers
