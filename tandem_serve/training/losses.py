"""The two drafter losses of the paper, and next-token cross-entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of targets [B, T] under logits [B, T, V] (float32). For MS: Tandem-CE."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def distillation_loss(logits: Tensor, targets: Tensor, teacher_probabilities: Tensor, weight: float) -> Tensor:
    """Tandem-Distil: (1 - weight) * CE against the text + weight * CE against ML's softmax; the paper's weight is 0.5.

    Args:
        logits: [B, T, V] of MS.
        targets: [B, T] int64, the next tokens of the text.
        teacher_probabilities: [B, T, V], ML's softmax at temperature 1, without gradient.
        weight: 0 is Tandem-CE.
    """
    log_probabilities = logits.float().log_softmax(-1)
    truth = -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()
    if weight == 0:
        return truth
    teacher = -(teacher_probabilities * log_probabilities).sum(-1).mean()
    return (1 - weight) * truth + weight * teacher
