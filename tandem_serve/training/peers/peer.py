"""What peers have in common: other ways than tandem to draft for the same primary, trained on the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class Peer(nn.Module):
    """A drafter that is trained and evaluated beside MS, and never served. Unrolls as training/unroll.py says."""

    kind: ClassVar[str]
    taps: tuple[int, ...]
    num_training_steps: int  # drafts of a block that its loss is the mean of

    def settings(self) -> dict[str, Any]:
        """What, beside the primary, its constructor needs to build it again."""
        raise NotImplementedError

    def unroll(self, token_ids: Tensor, representations: Tensor, num_steps: int) -> Iterator[Tensor]:
        """token_ids [B, T], representations [B, T, num_taps, d_L] -> num_steps times logits [B, T, V]."""
        raise NotImplementedError


def shifted(x: Tensor, by: int) -> Tensor:
    """x [B, T, d] moved `by` positions on: row i is x's row i - by, zero before the first."""
    return F.pad(x, (0, 0, by, 0))[:, : x.shape[1]]
