"""Verification: which drafts stand, and which token the primary adds (speculative decoding, coupled form)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Verdict(NamedTuple):
    """What one verification keeps of each block (vLLM's names)."""

    num_accepted_tokens: Tensor  # [B] int64, drafts only: 0 .. G
    next_token_ids: Tensor  # [B] int64, the primary's own: recovered after a rejection, bonus after a full block


def accept_prefix(
    draft_token_ids: Tensor,  # [B, G] int64, right-padded with -1; G may be 0
    target_token_ids: Tensor,  # [B, G + 1] int64, ML's own choice at each position; anything past a block's end + 1
) -> Verdict:
    """Keeps each block's longest prefix equal to ML's choices and adds ML's next token.

    Lossless because ML's choices do not depend on the draft (coupled sampling, arXiv 2408.07978): the choice after a
    prefix of equal tokens is the one that decoding without drafts makes there.
    """
    # A target that is itself padded with -1 must not match a draft's padding.
    matches = (draft_token_ids == target_token_ids[:, :-1]) & (draft_token_ids >= 0)
    num_accepted_tokens = matches.cumprod(dim=1).sum(dim=1)
    next_token_ids = target_token_ids.gather(1, num_accepted_tokens[:, None])[:, 0]
    return Verdict(num_accepted_tokens, next_token_ids)
