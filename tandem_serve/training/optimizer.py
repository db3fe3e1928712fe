"""The optimizer of every run: Muon for matrices, AdamW for the rest, one learning-rate schedule for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tandem_serve.training.muon import Float32Muon


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates are peaks. Muon's update is scaled to AdamW's, so one rate means the same for both."""

    learning_rate: float = 3e-3  # of matrices
    embedding_learning_rate: float = 3e-3  # of embeddings, norms, biases and stacked projections
    weight_decay: float = 0.05
    warmup_share: float = 0.02  # of all steps
    decay_share: float = 0.6  # of all steps, at the end, linear to 2 % of the peak
    clip_norm: float = 1.0
    muon: bool = True


def rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Warm-up, plateau, linear decay: the share of the peak rate at a step (from 0).

    Not a cosine: a plateau lets a run be resumed with a larger or smaller budget before its decay begins.
    """
    warm_up = min(1.0, (step + 1) / max(1.0, config.warmup_share * num_steps))
    decay = max(0.02, (num_steps - step) / max(1.0, config.decay_share * num_steps))
    return min(warm_up, decay, 1.0)


class ModelOptimizer:
    """Optimizes one model. Several of them in one run do not touch each other."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._config = config
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        hidden = [p for n, p in model.named_parameters() if _is_hidden_matrix(n, p)] if config.muon else []
        rest = [p for p in self._parameters if not any(p is h for h in hidden)]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=config.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        ]
        if hidden:
            muon = (Float32Muon if hidden[0].device.type == "cpu" else torch.optim.Muon)(
                hidden,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
                ns_steps=4,
            )
            self._optimizers.append(muon)
        self._peaks = [config.embedding_learning_rate, config.learning_rate]

    def step(self, rate: float) -> float:
        """Applies the gradients at `rate` times the peak and clears them. Returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state[str(i)])


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.ndim == 2 and name.rpartition(".")[2] not in ("embedding", "head")
