"""How well a drafter drafts for a primary, by parallel passes over known text: no engine, no cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.drafters import drafter_logits
from tandem_serve.training.generate import continuations
from tandem_serve.training.primary import sequence_logits

Drafter = TandemDrafter | Decoder


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
    primary: Decoder, drafter: Drafter, windows: Sequence[Tensor], block_length: int
) -> dict[str, float]:
    """The paper's Table 1 on batches [B, T + 1] of held-out text, cut in blocks of one length.

    Percentages of positions where MS's argmax is the text's next token (accuracy) and ML's argmax (agreement); CE
    against the text in nats; mean total variation distance between the two softmaxes.
    """
    sums = dict.fromkeys(("accuracy", "agreement", "cross_entropy", "total_variation"), 0.0)
    count = 0
    for batch in windows:
        token_ids, targets = batch[:, :-1], batch[:, 1:]
        ml, representations = _primary_pass(primary, drafter, token_ids)
        ms = drafter_logits(drafter, token_ids, representations, _blocks(token_ids, block_length, 0)).float()
        sums["accuracy"] += float((ms.argmax(-1) == targets).sum())
        sums["agreement"] += float((ms.argmax(-1) == ml.argmax(-1)).sum())
        sums["cross_entropy"] -= float(ms.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum())
        sums["total_variation"] += float((ms.softmax(-1) - ml.softmax(-1)).abs().sum()) / 2
        count += targets.numel()
    scale = {"accuracy": 100.0, "agreement": 100.0}
    return {name: scale.get(name, 1.0) * value / count for name, value in sums.items()}


@torch.inference_mode()
def evaluate_drafting(
    primary: Decoder, drafter: Drafter, texts: Tensor, prompt_length: int, block_length: int
) -> dict[str, Any]:
    """Greedy drafting on the primary's own greedy texts [B, P + N]: what decoding would accept, found without decoding.

    Every position is taken as the opening of a block once: while drafts equal the text, teacher forcing shows MS what
    its own drafting would have shown it. `accepted_per_block` then follows the blocks that decoding would open
    (a block opens behind the previous one's accepted drafts and ML's own token); `agreement` is the share of all
    in-block predictions that equal ML's choice, over every opening.
    """
    hits = _hits(primary, drafter, texts, block_length)  # [B, T - G, G]
    prefix = hits.cumprod(-1)
    accepted = prefix.sum(-1).tolist()
    reached = torch.zeros(block_length)
    blocks = 0
    for row, lengths in enumerate(accepted):
        opening = prompt_length
        while opening < len(lengths):
            reached += prefix[row, opening]
            blocks += 1
            opening += lengths[opening] + 1
    inside = hits[:, prompt_length:]
    return {
        "block_length": block_length,
        "num_blocks": blocks,
        "accepted_per_block": float(reached.sum()) / blocks,
        "accepted_per_position": [round(float(x) / blocks, 4) for x in reached],
        "agreement": 100 * float(inside.float().mean()),
        "agreement_per_position": [round(100 * float(x), 2) for x in inside.float().mean((0, 1))],
    }


def compare(
    primary: Decoder,
    drafters: Mapping[str, Drafter],
    windows: Sequence[Tensor],
    prompts: Tensor,
    *,
    num_tokens: int = 128,
    block_length: int = 5,
) -> dict[str, Any]:
    """All of the above for several drafters on the same texts; `windows` [B, T + 1] each, `prompts` [B, P]."""
    texts = continuations(primary, prompts, num_tokens)
    report: dict[str, Any] = {"primary": evaluate_primary(primary, windows), "drafters": {}}
    for name, drafter in drafters.items():
        report["drafters"][name] = {
            "text": {
                f"block_length_{g}": evaluate_on_text(primary, drafter, windows, g) for g in sorted({2, block_length})
            },
            "drafting": evaluate_drafting(primary, drafter, texts, prompts.shape[1], block_length),
        }
    return report


def _primary_pass(primary: Decoder, drafter: Drafter, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """ML's logits [B, T, V] and the representations that this drafter reads, [B, T, num_taps, d_L]."""
    num_tokens = token_ids.shape[1]
    taps = drafter.taps if isinstance(drafter, TandemDrafter) else ()
    positions = torch.arange(num_tokens, device=token_ids.device)
    attend = causal_attention(primary.config, num_tokens, token_ids.device)
    hidden, states = primary(token_ids, positions, attend, taps)
    return primary.logits(hidden).float(), torch.stack(states, -2) if states else hidden.unsqueeze(-2)


def _blocks(token_ids: Tensor, block_length: int, opening: int) -> Tensor:
    """Block numbers [1, T] where one block opens at position `opening` and each is block_length long."""
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    return ((positions - opening) // block_length + 1).unsqueeze(0)


def _hits(primary: Decoder, drafter: Drafter, texts: Tensor, block_length: int) -> Tensor:
    """Whether draft i of a block opened at position n equals the text: [B, T - G, G] int64.

    One pass for each of the G ways to lay blocks over the text opens a block at every position.
    """
    _, representations = _primary_pass(primary, drafter, texts)
    openings = texts.shape[1] - block_length
    hits = torch.zeros(texts.shape[0], openings, block_length, dtype=torch.int64)
    plain = isinstance(drafter, Decoder)
    for shift in range(1 if plain else block_length):
        logits = drafter_logits(drafter, texts, representations, _blocks(texts, block_length, shift))
        right = (logits[:, :-1].argmax(-1) == texts[:, 1:]).long().cpu()
        windows = right.unfold(1, block_length, 1)[:, :openings]  # [B, T - G, G]
        first, step = (0, 1) if plain else (shift, block_length)
        hits[:, first::step] = windows[:, first::step]
    return hits
