"""Tiny models that vLLM's CPU kernels take, and a vLLM engine on them. Imports vLLM only when asked for an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tandem_serve.config import VllmEngineConfig
from tests.checkpoints import CONFIG
from tests.engines import tiny_drafter, tiny_primary

MODEL = replace(CONFIG, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32)
KV_BLOCK = 32

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make setup-vllm)"),
]


def vllm_config(**fields: Any) -> VllmEngineConfig:
    defaults: dict[str, Any] = {
        "kv_cache_tokens": 1536,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "adapts": False,
        "taps": tiny_drafter("tandem", MODEL)[1].taps,
        "engine_args": {"block_size": KV_BLOCK},
    }
    return VllmEngineConfig(**{**defaults, **fields})


def build(link_factory: Callable[..., Any], **fields: Any) -> Any:
    """A VllmPrimary on the tiny model."""
    from tandem_serve.engine.vllm_primary.build import build_vllm_primary

    _, info, path = tiny_primary(MODEL)
    return build_vllm_primary(str(path), info, vllm_config(**fields), link_factory=link_factory)
