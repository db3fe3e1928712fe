"""Engines from a pool's configuration: checkpoint in, running engine out."""

from __future__ import annotations

from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig, VllmEngineConfig
from tandem_serve.decoding.block_policy import LearningPolicy
from tandem_serve.decoding.goodput import MeasuredBlockLength
from tandem_serve.engine.async_primary import AsyncPrimary
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.interfaces import LinkFactory
from tandem_serve.metrics import DrafterMetrics, PrimaryMetrics
from tandem_serve.models.checkpoint import (
    DTYPES,
    drafter_acceptance,
    drafter_info,
    load_decoder,
    load_drafter,
    primary_info,
)
from tandem_serve.tracing import SpanSink, discard


def build_primary(
    model: str,
    config: PrimaryEngineConfig | VllmEngineConfig,
    *,
    link_factory: LinkFactory | None = None,
    policy: LearningPolicy | MeasuredBlockLength | None = None,
    metrics: PrimaryMetrics | None = None,
    spans: SpanSink = discard,
) -> AsyncPrimary:
    """A primary, not yet started. No sequence may be longer than the whole KV budget, so that any can be served.

    Of policies, vLLM's engine takes a MeasuredBlockLength alone, and the torch engine anything else.

    Raises:
        CheckpointError: what is wrong with the model.
        ConfigError: vLLM is asked for, and is not there or does not fit.
    """
    if isinstance(config, VllmEngineConfig):
        from tandem_serve.engine.vllm_primary.build import build_vllm_primary

        longest = min(filter(None, (config.max_model_len, config.kv_cache_tokens)), default=None)
        return AsyncPrimary(
            build_vllm_primary(
                model,
                primary_info(model, max_model_len=longest),
                config,
                link_factory=link_factory,
                policy=policy if isinstance(policy, MeasuredBlockLength) else None,
                metrics=metrics,
            )
        )
    longest = min(config.max_model_len or config.kv_cache_tokens, config.kv_cache_tokens)
    info = primary_info(model, max_model_len=longest)
    decoder = load_decoder(model, dtype=DTYPES[config.dtype], device=config.device).pack()
    learning = None if isinstance(policy, MeasuredBlockLength) else policy
    engine = TorchPrimary(
        decoder, info, config, link_factory=link_factory, policy=learning, metrics=metrics, spans=spans
    )
    return AsyncPrimary(engine)


def build_drafter(
    model: str,
    config: DrafterEngineConfig,
    *,
    metrics: DrafterMetrics | None = None,
    spans: SpanSink = discard,
) -> DrafterEngine:
    """A drafter, tandem or plain, not yet started. Raises CheckpointError."""
    info = drafter_info(model, max_block_length=config.max_block_length)
    drafter = load_drafter(model, dtype=DTYPES[config.dtype], device=config.device).pack()
    acceptance = drafter_acceptance(model)
    return DrafterEngine(drafter, info, config, acceptance=acceptance, metrics=metrics, spans=spans)
