"""How often a draft is accepted, by how draft and primary are coupled: exact, from the two models' logits.

Of one token, with p the primary's and q the drafter's distribution at a temperature (sums over the whole vocabulary):

    rejection      sum min(p, q) = 1 - TV     rejection sampling: no coupling does better; needs q on the wire
    shared_noise   P(argmax of both + one noise is the same)     what this project does; ids only
    bound          (1 - TV) / (1 + TV)        what shared noise never falls below (arXiv 2408.07978)
    greedy_draft   p[argmax q]                ids only, the drafter greedy, a sampler that compares by chance
    sampled_draft  sum p q                    ids only, the drafter sampled on its own

Of a block, along texts that the primary itself has sampled (x_1 x_2 ... ~ p), the chance that draft i is accepted:

    rejection           product of min(1, q_j / p_j) over j <= i
    block_verification  min over j <= i of prod_{k <= j} q_k / p_k, and 1: the optimum (arXiv 2403.10444; its
                        P(accept i | drafts) = min_j prod_{k > j} p_k / q_k, weighed from drafts to the primary's texts)
    shared_noise        product of P(draft j = x_j | the primary's choice is x_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tandem_serve.models.decoder import Decoder
from tandem_serve.training.generate import continuations
from tandem_serve.training.unroll import Drafter, drafter_taps, unroll
from tandem_serve.training.views import primary_view

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
BLOCK_COUPLINGS = ("rejection", "block_verification", "shared_noise")


def shared_noise_agreement(p: Tensor, q: Tensor) -> Tensor:
    """P(both argmaxes are v) for distributions p, q [..., V] (float64) under shared Gumbel noise: [..., V].

    1 / sum_w max(p_w / p_v, q_w / q_v), in V log V: ordered by p / q, the maximum is p's on one side of v and q's on
    the other.
    """
    p, q = p.clamp_min(1e-300), q.clamp_min(1e-300)
    order = (p / q).argsort(-1)
    p_sorted, q_sorted = p.gather(-1, order), q.gather(-1, order)
    p_above = p_sorted.flip(-1).cumsum(-1).flip(-1)  # of v itself and all with a larger p / q
    q_below = q_sorted.cumsum(-1) - q_sorted
    joint = 1 / (p_above / p_sorted + q_below / q_sorted)
    return torch.empty_like(joint).scatter_(-1, order, joint)


def token_acceptance(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """The chances of one token, [...] each, of distributions [..., V]."""
    common = torch.minimum(p, q).sum(-1)
    return {
        "rejection": common,
        "shared_noise": shared_noise_agreement(p, q).sum(-1),
        "bound": common / (2 - common),
        "greedy_draft": p.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1),
        "sampled_draft": (p * q).sum(-1),
    }


def block_acceptance(p_of_text: Tensor, q_of_text: Tensor, agreement_of_text: Tensor) -> dict[str, Tensor]:
    """P(draft i accepted) [..., G] for blocks along the primary's texts.

    Args:
        p_of_text, q_of_text: [..., G], each model's probability of the text's token at each draft's place.
        agreement_of_text: [..., G], P(draft = primary's choice = that token) under shared noise.
    """
    ratio = q_of_text / p_of_text
    return {
        "rejection": ratio.clamp_max(1).cumprod(-1),
        "block_verification": ratio.cumprod(-1).cummin(-1).values.clamp_max(1),
        "shared_noise": (agreement_of_text / p_of_text).cumprod(-1),
    }


@torch.inference_mode()
def measure_couplings(
    primary: Decoder,
    drafter: Drafter,
    windows: Sequence[Tensor],  # [B, T + 1] each, text as it is
    prompts: Tensor,  # [B, P], for the primary to continue
    *,
    block_length: int = 5,
    num_tokens: int = 64,
    temperatures: Sequence[float] = TEMPERATURES,
) -> dict[str, Any]:
    """Per temperature: `token`, the mean over drafts 0 .. block_length - 1 on held-out text, and `block`, accepted
    drafts a block on the primary's own texts at that temperature, every position opening a block once."""
    report: dict[str, Any] = {}
    for temperature in temperatures:
        texts = continuations(primary, prompts, num_tokens, temperature=temperature)
        per_position = _on_own_texts(primary, drafter, texts, prompts.shape[1], block_length, temperature)
        report[f"{temperature:g}"] = {
            "token": _on_text(primary, drafter, windows, block_length, temperature),
            "block": {name: float(values.sum()) for name, values in per_position.items()},
            "block_per_position": {name: values.tolist() for name, values in per_position.items()},
        }
    return report


def _on_text(
    primary: Decoder, drafter: Drafter, windows: Sequence[Tensor], block_length: int, temperature: float
) -> dict[str, float]:
    sums: dict[str, float] = {}
    count = 0
    for batch in windows:
        for text in batch[:, :-1].split(1):  # [1, T, V] of float64 at a time
            view = primary_view(primary, text, drafter_taps(drafter))
            p = _distribution(view.logits, temperature)[:, block_length - 1 :]
            for logits in unroll(drafter, text, view.representations, block_length):
                q = _distribution(logits, temperature)[:, block_length - 1 :]
                for name, chance in token_acceptance(p, q).items():
                    sums[name] = sums.get(name, 0.0) + float(chance.sum())
                count += p.shape[1]
    return {name: value / count for name, value in sums.items()}


def _on_own_texts(
    primary: Decoder, drafter: Drafter, texts: Tensor, prompt_length: int, block_length: int, temperature: float
) -> dict[str, Tensor]:
    """P(draft i accepted), [G] each, over all blocks that open at prompt_length or later and lie in the text."""
    totals: dict[str, Tensor] = {}
    openings = torch.arange(prompt_length, texts.shape[1] - block_length)
    for text in texts.split(1):
        view = primary_view(primary, text, drafter_taps(drafter))
        p, chosen = _distribution(view.logits, temperature)[:, :-1], text[:, 1:, None]
        places = []  # for each draft: the three probabilities of the text's token, [openings] each
        for step, logits in enumerate(unroll(drafter, text, view.representations, block_length)):
            q = _distribution(logits, temperature)[:, :-1]
            each = [x.gather(-1, chosen)[0, openings + step, 0] for x in (p, q, shared_noise_agreement(p, q))]
            places.append(torch.stack(each))
        for name, chance in block_acceptance(*torch.stack(places, -1)).items():
            totals[name] = totals.get(name, 0) + chance.sum(0)
    return {name: total / (len(openings) * len(texts)) for name, total in totals.items()}


def _distribution(logits: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).softmax(-1)
