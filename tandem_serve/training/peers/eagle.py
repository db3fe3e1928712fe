"""An EAGLE-style drafter (arXiv 2401.15077, 2503.01840): the primary's features join the input, KV is its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tandem_serve.models.decoder import Decoder
from tandem_serve.models.norm import RmsNorm
from tandem_serve.training.initial import DrafterShape, initial_decoder
from tandem_serve.training.peers.peer import Peer, shifted
from tandem_serve.training.unroll import OwnKeys

_TRAINING_STEPS = 4


class Eagle(Peer):
    """A small decoder whose input at a position is its token's embedding and the feature of the position before.

    The feature is the primary's fused low, middle and high states where that position is verified, and the drafter's
    own output where it is not (EAGLE-3). Training unrolls as drafting does ("training-time test"), so that it meets its
    own outputs. Unlike MS it must run every prompt, and its keys of the past come from its own layers.
    """

    kind = "eagle"

    def __init__(
        self,
        primary: Decoder,
        shape: DrafterShape,
        taps: tuple[int, ...] | None = None,
        num_training_steps: int = _TRAINING_STEPS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        c = primary.config
        self.taps = tuple(taps or sorted({max(1, c.num_layers // 8), max(1, c.num_layers // 2), c.num_layers}))
        self.num_training_steps = num_training_steps
        self._shape = shape
        self._normalise = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.decoder = initial_decoder(shape, c, seed=seed, device=str(primary.device))
        random = torch.Generator().manual_seed(seed)
        inputs, width = len(self.taps) * c.hidden_size, shape.hidden_size
        self.fuse = nn.Parameter((torch.randn(inputs, width, generator=random) * inputs**-0.5).to(primary.device))
        self.mix = nn.Parameter((torch.randn(2 * width, width, generator=random) * 0.02).to(primary.device))

    def settings(self) -> dict[str, Any]:
        return {"shape": vars(self._shape), "taps": self.taps, "num_training_steps": self.num_training_steps}

    def unroll(self, token_ids: Tensor, representations: Tensor, num_steps: int) -> Iterator[Tensor]:
        decoder = self.decoder
        embedded, positions = decoder.embed(token_ids), torch.arange(token_ids.shape[1], device=token_ids.device)
        features = self._normalise(representations).to(self.fuse.dtype).flatten(-2) @ self.fuse
        verified: list[tuple[Tensor, Tensor]] = []
        own = OwnKeys(decoder.config.num_layers)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(verified) == layer:
                verified.append((k, v))
            else:
                own.append(layer, k, v)
            return own.attend(layer, q, *verified[layer], decoder.config.sliding_windows[layer])

        for _ in range(num_steps):
            x = torch.cat((embedded, shifted(features, 1)), -1) @ self.mix
            features = decoder.run_layers(x, positions, attend).hidden
            yield decoder.logits(features)
