"""Function-preserving expansion: a primary as dear as a larger one, with the very same output.

Small demo weights have a ratio of costs between primary and drafter that no real pair has. Inflating the primary makes
that ratio realistic without touching acceptance: a benchmark's device, never a served model.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tandem_serve.models.decoder import Decoder

_WRITES_RESIDUAL = ("output", "output_bias", "down")


@torch.no_grad()
def inflate(decoder: Decoder, times: int) -> Decoder:
    """A new decoder that reads about `times` as many weights per token and computes exactly the same.

    Layers are appended *after* the real ones, so tap numbers and tap values stay what they were. Each is a copy of a
    real layer, memory of its own, that attends and multiplies like any other but whose output projections are zero: it
    adds 0 to the residual stream. Enough are added to make up for the output head too. The KV cache grows likewise.

    Raises:
        ValueError: for `times` below 1.
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, not {times}")
    c = decoder.config
    a_layer = sum(p.numel() for p in decoder.layers[0].parameters())
    head = c.vocab_size * c.hidden_size
    extra = round((times - 1) * (c.num_layers * a_layer + head) / a_layer)
    source = [*range(c.num_layers), *(i % c.num_layers for i in range(extra))]
    config = replace(c, num_layers=len(source), sliding_windows=tuple(c.sliding_windows[i] for i in source))
    inflated = Decoder(config, dtype=decoder.dtype, device=decoder.device).train(decoder.training)
    inflated.embedding.copy_(decoder.embedding)
    inflated.norm.copy_(decoder.norm)
    if inflated.head is not None and decoder.head is not None:
        inflated.head.copy_(decoder.head)
    for index, (layer, origin) in enumerate(zip(inflated.layers, source, strict=True)):
        layer.load_state_dict(decoder.layers[origin].state_dict())
        if index >= c.num_layers:
            for name, parameter in layer.named_parameters():
                if name in _WRITES_RESIDUAL:
                    parameter.zero_()
    return inflated.requires_grad_(decoder.norm.requires_grad)
