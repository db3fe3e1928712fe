"""What an acceptance model says of drafts, as the stopping rules of decoding/ ask for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import Choice
from tandem_serve.decoding.stopping_rules import DEFAULT_THRESHOLDS, entropy_score, own_logprobs
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
        grid = (torch.arange(_GRID, device=decoder.device) + 0.5) / _GRID
        self._quick = model.quick(grid.log()).sigmoid()
        self.thresholds: Mapping[PolicyName, float] = {**DEFAULT_THRESHOLDS, **model.thresholds}

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> Tensor:
        """See Scorer."""
        if policy is PolicyName.ENTROPY:
            return entropy_score(logits)
        if policy is PolicyName.ROUTER:
            features = draft_features(logits, own_logprobs(drafts), self._model.config.top_k)
            return self._model.mlp(features, self._embedding).sigmoid()
        return self._quick[(own_logprobs(drafts).exp() * (_GRID - 1)).long()]
