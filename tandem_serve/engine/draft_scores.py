"""What an acceptance model says of drafts, as the stopping rules of decoding/ ask for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import Choice
from tandem_serve.decoding.stopping_rules import DEFAULT_THRESHOLDS, entropy_score, own_probs
from tandem_serve.models.acceptance import AcceptanceModel, draft_features
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import PolicyName

_GRID = 1024


class AcceptanceScorer:
    """A Scorer (decoding/stopping_rules.py) over a drafter's acceptance model.

    The MLP is the router policy's. Optimal stopping uses the quick model, as a table over the draft's probability: its
    rule runs once a draft, of which a small MS makes thousands a second.
    """

    def __init__(self, model: AcceptanceModel, decoder: Decoder) -> None:
        self._model = model.to(decoder.device)
        self._embedding = decoder.embedding
        logprobs = ((torch.arange(_GRID, device=decoder.device) + 0.5) / _GRID).log()
        is_sampled = torch.tensor([[False], [True]], device=decoder.device).expand(-1, _GRID)
        self._quick: list[list[float]] = model.quick(logprobs.expand(2, -1), is_sampled).sigmoid().tolist()
        self.thresholds: Mapping[PolicyName, float] = {**DEFAULT_THRESHOLDS, **model.thresholds}

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> list[float]:
        """See Scorer."""
        if policy is PolicyName.ENTROPY:
            scores: list[float] = entropy_score(logits).tolist()
            return scores
        if policy is PolicyName.ROUTER:
            is_sampled = torch.tensor(drafts.is_sampled, device=logits.device)
            features = draft_features(logits, own_probs(drafts).log(), is_sampled, self._model.config.top_k)
            scores = self._model.mlp(features, self._embedding).sigmoid().tolist()
            return scores
        probs = own_probs(drafts).tolist()
        return [self._quick[sampled][int(p * (_GRID - 1))] for p, sampled in zip(probs, drafts.is_sampled, strict=True)]
