"""Every block that could open anywhere in a text, drafted side by side: one pass for each draft of a block.

Step s yields logits [B, T, V] whose row i is what the drafter says of token i + 1 as draft s of a block, that is, of a
block that opens at position i - s: all earlier positions were verified, and the block's own tokens equal the text (if
they did not, the block would have ended there). Rows i < s open before the text does and mean nothing. What a step says
does not depend on how many follow, so the longest block length holds the figures of all shorter ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.primary import sequence_logits


class Unrolled(Protocol):
    """A drafter of another kind than MS (peers/)."""

    @property
    def taps(self) -> tuple[int, ...]: ...

    def unroll(self, token_ids: Tensor, representations: Tensor, num_steps: int) -> Iterator[Tensor]:
        """See the module. token_ids [B, T] int64; representations [B, T, num_taps, d_L] in the order of `taps`."""
        ...


Drafter = TandemDrafter | Decoder | Unrolled


def drafter_taps(drafter: Drafter) -> tuple[int, ...]:
    """The primary's layers that a drafter reads; none for a plain one."""
    return () if isinstance(drafter, Decoder) else drafter.taps


def unroll(drafter: Drafter, token_ids: Tensor, representations: Tensor, num_steps: int) -> Iterator[Tensor]:
    """Yields num_steps times logits [B, T, V]. A plain drafter, to whom blocks mean nothing, repeats one tensor."""
    if isinstance(drafter, TandemDrafter):
        return _unroll_tandem(drafter, token_ids, representations, num_steps)
    if isinstance(drafter, Decoder):
        return repeat(sequence_logits(drafter, token_ids), num_steps)
    return drafter.unroll(token_ids, representations, num_steps)


def _unroll_tandem(
    drafter: TandemDrafter, token_ids: Tensor, representations: Tensor, num_steps: int
) -> Iterator[Tensor]:
    decoder = drafter.decoder
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    verified = drafter.project(representations, positions)
    own = OwnKeys(decoder.config.num_layers)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own.append(layer, k, v)
        return own.attend(layer, q, *verified[layer], decoder.config.sliding_windows[layer])

    for _ in range(num_steps):
        yield decoder.logits(decoder.run_layers(decoder.embed(token_ids), positions, attend).hidden)


class OwnKeys:
    """The keys and values that each of T blocks, one a position, has made itself so far; the newest first."""

    def __init__(self, num_layers: int) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys and values [B, T, Hkv, D] of each block's next position. Row i then belongs to a block one shorter."""
        held = self._layers[layer]
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        if held is not None:
            k, v = torch.cat((k, held[0].roll(1, 1)), 2), torch.cat((v, held[1].roll(1, 1)), 2)
        self._layers[layer] = k, v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Queries [B, T, H, D] on verified keys [B, T, Hkv, D] of positions before their block and on its own keys.

        With A own keys, a query at i sees verified positions up to i - A. Returns [B, T, H * D].
        """
        groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
        held = self._layers[layer]
        num_own = 0 if held is None else held[0].shape[2]
        positions = torch.arange(q.shape[1], device=q.device)
        age = positions[:, None] - positions
        seen = age >= num_own if window is None else (age >= num_own) & (age < window)
        k, v = k.to(q.dtype).repeat_interleave(groups, 2), v.to(q.dtype).repeat_interleave(groups, 2)
        scores = torch.einsum("bthd,bshd->bhts", q, k).masked_fill(~seen, -torch.inf)
        if held is None:
            weights = (scores.float() * scale).softmax(-1).to(q.dtype)
            return torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2)
        own_k, own_v = (x.repeat_interleave(groups, 3) for x in held)
        own = torch.einsum("bthd,btahd->bhta", q, own_k)
        if window is not None:
            own[..., window:] = -torch.inf
        weights = (torch.cat((scores, own), -1).float() * scale).softmax(-1).to(q.dtype)
        mixed = torch.einsum("bhts,bshd->bthd", weights[..., : q.shape[1]], v)
        return (mixed + torch.einsum("bhta,btahd->bthd", weights[..., q.shape[1] :], own_v)).flatten(-2)
