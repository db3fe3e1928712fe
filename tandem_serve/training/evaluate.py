"""How well a drafter drafts for a primary, by parallel passes over known text: no engine, no cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.models.decoder import Decoder
from tandem_serve.training.peers.prompt_lookup import PromptLookup
from tandem_serve.training.primary import sequence_logits
from tandem_serve.training.unroll import Drafter, drafter_taps, unroll
from tandem_serve.training.views import primary_view
from tandem_serve.types import SamplingParams

_PERCENT = ("accuracy", "agreement")
_MEASURES = (*_PERCENT, "cross_entropy", "total_variation")


@torch.inference_mode()
def evaluate_primary(primary: Decoder, windows: Sequence[Tensor]) -> dict[str, float]:
    """Loss in nats and accuracy in percent on batches [B, T + 1] of held-out text."""
    loss = hits = count = 0.0
    for batch in windows:
        logits, targets = sequence_logits(primary, batch[:, :-1]).float(), batch[:, 1:]
        loss -= float(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum())
        hits += float((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    return {"loss": loss / count, "accuracy": 100 * hits / count, "num_tokens": count}


@torch.inference_mode()
def evaluate_on_text(
    primary: Decoder, drafter: Drafter, windows: Sequence[Tensor], block_lengths: Sequence[int]
) -> dict[str, Any]:
    """The paper's Table 1 on batches [B, T + 1] of held-out text, for each block length.

    Percentages of positions where MS's argmax is the text's next token (accuracy) and ML's argmax (agreement); CE
    against the text in nats; mean total variation distance between the two softmaxes. Every position that lies at
    least max(block_lengths) - 1 behind a window's start is predicted as draft 0, 1, ... of a block; a block length's
    figures are the means over its drafts. `by_position` lists them one by one; `primary` is ML at the same positions.
    """
    num_steps = max(block_lengths)
    sums = torch.zeros(num_steps, len(_MEASURES), dtype=torch.float64)
    primary_sums = torch.zeros(len(_MEASURES), dtype=torch.float64)
    count = 0
    for batch in windows:
        token_ids, targets = batch[:, :-1], batch[:, num_steps:]
        view = primary_view(primary, token_ids, drafter_taps(drafter))
        ml = view.logits[:, num_steps - 1 :].float()
        seen: tuple[Tensor, Tensor] | None = None  # a plain drafter says the same at every step
        for step, logits in enumerate(unroll(drafter, token_ids, view.representations, num_steps)):
            if seen is None or seen[0] is not logits:
                seen = logits, _measures(logits[:, num_steps - 1 :].float(), ml, targets)
            sums[step] += seen[1]
        primary_sums += _measures(ml, ml, targets)
        count += targets.numel()
    sums /= count
    columns = {name: sums[:, i] * (100 if name in _PERCENT else 1) for i, name in enumerate(_MEASURES)}
    return {
        "num_tokens": count,
        "block_lengths": {
            str(g): {name: float(values[:g].mean()) for name, values in columns.items()} for g in block_lengths
        },
        "primary": {
            name: float(value) * (100 if name in _PERCENT else 1) / count
            for name, value in zip(_MEASURES, primary_sums, strict=True)
        },
        "by_position": {name: values.tolist() for name, values in columns.items()},
    }


def _measures(ms: Tensor, ml: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions of what _MEASURES names, from logits [B, T, V] and targets [B, T]."""
    best = ms.argmax(-1)
    return torch.stack(
        [
            (best == targets).sum().double(),
            (best == ml.argmax(-1)).sum().double(),
            -ms.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum().double(),
            (ms.softmax(-1) - ml.softmax(-1)).abs().sum().double() / 2,
        ]
    ).cpu()


@dataclass(frozen=True)
class OwnTexts:
    """Texts [B, P + N] that the primary wrote: row r from seed + r, as `continuations` does."""

    token_ids: Tensor
    prompt_length: int
    seed: int = 0


@torch.inference_mode()
def draft_hits(
    primary: Decoder, drafter: Drafter | PromptLookup, texts: OwnTexts, num_steps: int, temperature: float = 0.0
) -> Tensor:
    """Whether draft s of a block opened at position n equals the text's token n + 1 + s: [B, T, num_steps] bool.

    The drafter draws the primary's own noise, as in serving. False where the text has ended.
    """
    if isinstance(drafter, PromptLookup):
        return drafter.hits(texts.token_ids, texts.prompt_length, num_steps)
    batch, num_tokens = texts.token_ids.shape
    hits = torch.zeros(batch, num_tokens, num_steps, dtype=torch.bool)
    first = texts.prompt_length  # of the openings: nothing before it counts
    for row, token_ids in enumerate(texts.token_ids.split(1)):
        view = primary_view(primary, token_ids, drafter_taps(drafter))
        params = SamplingParams(temperature, seed=texts.seed + row)
        rows = SamplingRows.from_params([(params, p) for p in range(first + 1, num_tokens)], token_ids.device)
        for step, logits in enumerate(unroll(drafter, token_ids, view.representations, num_steps)):
            chosen = choose_token_ids(logits[0, first:-1].float(), rows).token_ids
            right = chosen == token_ids[0, first + 1 :]  # of positions first ..
            hits[row, first : num_tokens - 1 - step, step] = right[step:].cpu()
    return hits


def drafting_figures(
    hits: Iterable[tuple[Tensor, int]], block_lengths: Sequence[int], runs: Callable[[int], int] = lambda drafts: drafts
) -> dict[str, Any]:
    """What decoding would do with such drafts, found without decoding; for each block length.

    Args:
        hits: `draft_hits` of some texts, and their prompts' length.
        runs: the drafter's passes for a block of so many drafts.

    A response's first token comes with the prompt's pass. Then blocks follow each other as in serving: block_length
    drafts, or as many as the response has left beside ML's own token, of which the accepted ones and ML's own token
    move the sequence on. `accepted_per_block_error` is a standard error over responses, None of a single one.
    `agreement` is the share of all drafts, over every opening, that equal ML's choice, whatever became of the block's
    earlier ones.
    """
    tables = list(hits)
    figures = {}
    for length in block_lengths:
        walks = [_walk(row, start, length) for table, start in tables for row in _accepted(table)]
        blocks = [block for walk in walks for block in walk if block.drafted]
        reached = [sum(b.accepted > i for b in blocks) for i in range(length)]
        offered = [sum(b.drafted > i for b in blocks) for i in range(length)]
        drafted = sum(b.drafted for b in blocks)
        figures[str(length)] = {
            "num_blocks": len(blocks),
            "accepted_per_block": sum(b.accepted for b in blocks) / max(1, len(blocks)),
            "accepted_per_block_error": _standard_error(walks),
            "accepted_per_position": [r / max(1, o) for r, o in zip(reached, offered, strict=True)],
            "acceptance_rate": sum(b.accepted for b in blocks) / max(1, drafted),
            "agreement": 100 * _mean_agreement(tables, range(length)),
            "primary_runs_per_response": 1 + sum(map(len, walks)) / len(walks),
            "drafter_runs_per_response": sum(runs(b.drafted) for b in blocks) / len(walks),
        }
    longest = max(block_lengths)
    return {
        "num_responses": sum(len(table) for table, _ in tables),
        "block_lengths": figures,
        "agreement_by_position": [100 * _mean_agreement(tables, [i]) for i in range(longest)],
    }


@dataclass(frozen=True, slots=True)
class _Block:
    drafted: int
    accepted: int


def _accepted(table: Tensor) -> list[list[int]]:
    """How many drafts of a block are right from its start, for each row and opening of `draft_hits`."""
    accepted: list[list[int]] = table.long().cumprod(-1).sum(-1).tolist()
    return accepted


def _walk(accepted: Sequence[int], start: int, block_length: int) -> list[_Block]:
    """The rounds of one response whose first token is at position `start`."""
    blocks: list[_Block] = []
    opening, last = start, len(accepted) - 1
    while opening < last:
        drafted = min(block_length, last - opening - 1)
        blocks.append(_Block(drafted, min(drafted, accepted[opening])))
        opening += blocks[-1].accepted + 1
    return blocks


def _standard_error(walks: Sequence[Sequence[_Block]]) -> float | None:
    """Of accepted drafts a block, a ratio of sums: how far as many other responses, to prompts alike, would be off.

    Responses, not blocks, are what was drawn: blocks of one text are alike. None: a single one does not tell.
    """
    totals = [(sum(b.accepted for b in walk), sum(b.drafted > 0 for b in walk)) for walk in walks]
    accepted, blocks = sum(a for a, _ in totals), sum(n for _, n in totals)
    if len(walks) < 2 or not blocks:
        return None
    squares = math.fsum((a - accepted / blocks * n) ** 2 for a, n in totals)
    return math.sqrt(squares * len(walks) / (len(walks) - 1)) / blocks


def _mean_agreement(tables: Sequence[tuple[Tensor, int]], steps: Iterable[int]) -> float:
    right = count = 0
    for table, start in tables:
        for step in steps:
            inside = table[:, start : table.shape[1] - 1 - step, step]
            right, count = right + int(inside.sum()), count + inside.numel()
    return right / max(1, count)
