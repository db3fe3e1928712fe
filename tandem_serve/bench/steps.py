"""One-token steps of the lean decoder against transformers' on the same weights, batch 1, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.checkpoint import DTYPES, load_decoder
from tandem_serve.models.decoder import Decoder


def measure_steps(models: dict[str, Path], context: int, steps: int) -> dict[str, Any]:
    """For each model: ms a token in each dtype, ours and transformers'; the ratio is best of ours to best of theirs.

    A step is what decoding does once a token: one position through all layers and the head, and an argmax, with
    `context` positions in the cache. A tandem drafter is measured by its own layers, as a plain decoder of its shape.
    """
    return {name: _measure(path, context, steps) for name, path in models.items()}


def _measure(path: Path, context: int, steps: int) -> dict[str, Any]:
    figures: dict[str, dict[str, float]] = {"lean": {}, "transformers": {}}
    for dtype_name, dtype in DTYPES.items():
        contenders = {"lean": _lean(path, dtype, context), "transformers": _transformers(path, dtype, context)}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        with torch.inference_mode():
            for turn in range(-10, steps):  # the first ten warm up
                for name, step in contenders.items():
                    start = time.perf_counter()
                    step()
                    if turn >= 0:
                        times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            figures[name][dtype_name] = median(seconds) * 1e3
    best = {name: min(by_dtype.values()) for name, by_dtype in figures.items()}
    return {"step_ms": figures, "ratio": best["transformers"] / best["lean"]}


def _lean(path: Path, dtype: torch.dtype, context: int) -> Callable[[], int]:
    decoder = load_decoder(path, dtype=dtype).pack()
    kv = KvBuffer(decoder.config, context + 1, dtype, decoder.device)
    with torch.inference_mode():
        forward(decoder, [Rows(kv, 0, _tokens(decoder, context), 1)])

    def step() -> int:
        return int(forward(decoder, [Rows(kv, context, [7], 1)]).logits.argmax())

    return step


def _transformers(path: Path, dtype: torch.dtype, context: int) -> Callable[[], int]:
    """transformers' own decoding step: DynamicCache, SDPA attention. The cache is cut back after each step."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.eval()
    cache = DynamicCache(config=model.config)
    token: Tensor = torch.tensor([[7]])
    with torch.inference_mode():
        model(torch.tensor([_token_list(model.config.vocab_size, context)]), past_key_values=cache, use_cache=True)

    def step() -> int:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)  # negative: how many to drop
        return int(logits[0, -1].argmax())

    return step


def _tokens(decoder: Decoder, count: int) -> list[int]:
    return _token_list(decoder.config.vocab_size, count)


def _token_list(vocab_size: int, count: int) -> list[int]:
    return [i % vocab_size for i in range(1, count + 1)]
