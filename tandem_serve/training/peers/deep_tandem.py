"""Deep Tandem (section 5 of the paper): the primary sketches positions ahead, MS adds the sketch to its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.models.norm import RmsNorm
from tandem_serve.training.initial import DrafterShape, initial_decoder
from tandem_serve.training.peers.peer import Peer, shifted


class DeepTandem(Peer):
    """A small decoder of its own KV whose input at position i is the embedding and a sketch of i.

    The primary, running over the previous block in parallel, sketches the next one: the sketch of position i is a
    linear map of its last hidden state at i - lookahead. A block of up to `lookahead` drafts therefore needs verified
    states only, wherever it opens; later drafts go without a sketch. With the primary frozen it never learns to
    sketch, and MS takes what its states happen to hold; `--train-primary drafter-loss` lets it learn.
    """

    kind = "deep-tandem"
    num_training_steps = 1

    def __init__(self, primary: Decoder, shape: DrafterShape, lookahead: int, seed: int = 0) -> None:
        super().__init__()
        c = primary.config
        self.taps = (c.num_layers,)
        self.lookahead = lookahead
        self._shape = shape
        self._normalise = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.decoder = initial_decoder(shape, c, seed=seed, device=str(primary.device))
        random = torch.Generator().manual_seed(seed)
        sketch = torch.randn(c.hidden_size, shape.hidden_size, generator=random) * 0.02 * c.hidden_size**-0.5
        self.sketch = nn.Parameter(sketch.to(primary.device))

    def settings(self) -> dict[str, Any]:
        return {"shape": vars(self._shape), "lookahead": self.lookahead}

    def unroll(self, token_ids: Tensor, representations: Tensor, num_steps: int) -> Iterator[Tensor]:
        embedded = self.decoder.embed(token_ids)
        states = self._normalise(representations[..., 0, :]).to(self.sketch.dtype)
        sketched = self._run(embedded + shifted(states, self.lookahead) @ self.sketch)
        for _ in range(min(num_steps, self.lookahead)):
            yield sketched
        if num_steps > self.lookahead:
            unsketched = self._run(embedded)
            for _ in range(num_steps - self.lookahead):
                yield unsketched

    def _run(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[1]
        attend = causal_attention(self.decoder.config, num_tokens, x.device)
        return self.decoder.logits(self.decoder.run_layers(x, torch.arange(num_tokens, device=x.device), attend).hidden)
