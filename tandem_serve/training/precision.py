"""Where bf16 pays: for autocast, and for the optimizer's own products."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch

from tandem_serve.errors import ConfigError


def multiplies_bf16(device: str | torch.device) -> bool:
    """Whether it is a GPU, or a CPU with instructions for it (AVX-512 BF16 or AMX).

    Other CPUs widen bf16 to float32 first: the casts cost more than they save, and on those without AVX-512 torch
    leaves the product to a plain loop, 50 times slower than float32.
    """
    return torch.device(device).type != "cpu" or _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """bf16 autocast where asked for; `auto`: where bf16 pays.

    Raises:
        ConfigError: for another name than auto, bf16 and fp32.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision {precision!r}: expected auto, bf16 or fp32")
    wanted = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
    return torch.autocast(torch.device(device).type, torch.bfloat16) if wanted else contextlib.nullcontext()
