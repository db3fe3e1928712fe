"""Attention of a ragged flat batch: every sequence's tokens in one [N], each against its own KV buffer.

Projections and feed-forward run on all N rows at once; only the attention loops over sequences, and a sequence costs
one kernel a layer. Shape letters: N rows, n of them one sequence's, S keys, H heads, Hkv key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.decoder import DecoderConfig


class Span(NamedTuple):
    """One sequence's rows in a batch: positions start .. start + num_tokens - 1, all below already in the buffer."""

    kv: KvBuffer
    start: int
    num_tokens: int


class _SeenKeys(NamedTuple):
    """What one span's queries attend to in the layers with one sliding window."""

    planes: tuple[Tensor, ...]  # 2 * L views [1, Hkv, S, D]
    mask: Tensor | None  # [n, S], 0 or -inf
    is_causal: bool


class RaggedAttention:
    """An Attend (models/decoder.py) over spans that lie one after another in the batch. Good for one forward pass.

    Writes the spans' new keys and values, then lets each query see its own and all earlier positions of its sequence
    (of the last `window` where the layer slides). Views and masks are made once here and shared by all layers.
    """

    def __init__(self, config: DecoderConfig, spans: Sequence[Span], dtype: torch.dtype) -> None:
        self._lengths = [span.num_tokens for span in spans]
        self._targets = [span.kv.views(span.start, span.start + span.num_tokens) for span in spans]
        self._windows = config.sliding_windows
        self._seen = {
            window: [_seen_keys(span, window, dtype) for span in spans] for window in dict.fromkeys(self._windows)
        }
        self._grouped = config.num_heads != config.num_kv_heads

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, Hkv, D], rotated -> [N, H * D]."""
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        seen = self._seen[self._windows[layer]]
        if len(self._lengths) == 1:
            mixed = self._attend(layer, self._targets[0], seen[0], q, k, v)
        else:
            parts = zip(
                self._targets,
                seen,
                q.split(self._lengths, 1),
                k.split(self._lengths, 1),
                v.split(self._lengths, 1),
                strict=True,
            )
            mixed = torch.cat([self._attend(layer, *part) for part in parts], 2)
        return mixed.squeeze(0).transpose(0, 1).flatten(-2)

    def _attend(
        self, layer: int, targets: tuple[Tensor, ...], seen: _SeenKeys, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """One span: q [H, n, D], k and v [Hkv, n, D] -> [1, H, n, D]."""
        targets[2 * layer].copy_(k)
        targets[2 * layer + 1].copy_(v)
        keys, values = seen.planes[2 * layer], seen.planes[2 * layer + 1]
        if self._grouped and q.shape[1] == 1:
            # A group's heads see the same keys from the same position: so many queries of one head to the kernel.
            by_group = q.view(1, keys.shape[1], -1, q.shape[2])
            return F.scaled_dot_product_attention(by_group, keys, values).view(1, -1, 1, q.shape[2])
        return F.scaled_dot_product_attention(
            q.unsqueeze(0),
            keys,
            values,
            attn_mask=seen.mask,
            is_causal=seen.is_causal,
            enable_gqa=self._grouped,
        )


def _seen_keys(span: Span, window: int | None, dtype: torch.dtype) -> _SeenKeys:
    """The keys that any of a span's queries sees, and which query sees which.

    A span of one token sees all that is cut out, and a span from position 0 is plainly causal: neither needs a mask,
    whose rows would cost as much memory as the keys.
    """
    start, num_tokens = span.start, span.num_tokens
    first = 0 if window is None else max(0, start + 1 - window)
    planes = span.kv.planes[None, :, :, first : start + num_tokens].unbind(1)
    slides = window is not None and start + num_tokens - first > window
    if num_tokens == 1:
        return _SeenKeys(planes, None, False)
    if start == 0 and not slides:
        return _SeenKeys(planes, None, True)
    shape = (num_tokens, start + num_tokens - first)
    # Row i is position start + i, column j position first + j: -inf right of the diagonal, and left of the window.
    mask = torch.full(shape, -torch.inf, dtype=dtype, device=span.kv.planes.device).triu_(start - first + 1)
    if slides and window is not None:
        mask += torch.full_like(mask, -torch.inf).tril_(start - first - window)
    return _SeenKeys(planes, mask, False)
