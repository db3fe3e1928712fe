"""Prompt lookup: the drafts are what followed the text's last words when they were last written. No model."""

from __future__ import annotations

import torch
from torch import Tensor

_LONGEST, _SHORTEST = 3, 1  # tokens to recognise


class PromptLookup:
    """Proposes tokens, not distributions: it has no accuracy on text, only acceptance."""

    kind = "prompt-lookup"
    taps: tuple[int, ...] = ()

    def hits(self, texts: Tensor, prompt_length: int, num_steps: int) -> Tensor:
        """evaluate.draft_hits of texts [B, T]: [B, T, num_steps] bool."""
        hits = torch.zeros(*texts.shape, num_steps, dtype=torch.bool)
        for row, text in enumerate(texts.tolist()):
            for opening in range(prompt_length, len(text) - 1):
                drafts = lookup(text[: opening + 1], num_steps)
                following = text[opening + 1 : opening + 1 + num_steps]
                right = [a == b for a, b in zip(drafts, following, strict=False)]
                hits[row, opening, : len(right)] = torch.tensor(right, dtype=torch.bool)
        return hits


def lookup(text: list[int], num_drafts: int) -> list[int]:
    """What followed the latest earlier occurrence of the last 3 tokens, else 2, else 1. May be short or empty."""
    for length in range(min(_LONGEST, len(text) - 1), _SHORTEST - 1, -1):
        suffix = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == suffix:
                return text[start + length : start + length + num_drafts]
    return []
