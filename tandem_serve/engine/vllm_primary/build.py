"""A VllmPrimary from a checkpoint and its configuration."""

from __future__ import annotations

import os
from typing import Any

import torch

from tandem_serve.config import VllmEngineConfig
from tandem_serve.decoding.goodput import MAX_BLOCK_LENGTH, MeasuredBlockLength
from tandem_serve.engine.vllm_primary.options import TandemOptions
from tandem_serve.errors import ConfigError
from tandem_serve.interfaces import LinkFactory
from tandem_serve.metrics import PrimaryMetrics
from tandem_serve.models.checkpoint import resolve_folder
from tandem_serve.types import PrimaryInfo

_PACKAGE = "tandem_serve.engine.vllm_primary"
_SPARE_TOKENS = 128  # a KV block of vLLM's that it keeps for itself


def build_vllm_primary(
    model: str,
    info: PrimaryInfo,
    config: VllmEngineConfig,
    *,
    link_factory: LinkFactory | None = None,
    policy: MeasuredBlockLength | None = None,
    metrics: PrimaryMetrics | None = None,
) -> Any:
    """A VllmPrimary, loaded. Takes some 15 s, much of it vLLM's import.

    Raises:
        ConfigError: vLLM is not installed, is another than this was made for, or refuses the configuration.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine steps on our thread; its workers are its business
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if _is_eager(config):  # vLLM compiles some helpers on first use all the same: a minute, in the middle of a request
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(f"engine: vllm needs vLLM, which cannot be imported ({error}): make setup-vllm") from error
    from tandem_serve.engine.vllm_primary.engine import VllmPrimary

    arguments = engine_arguments(model, info, config, is_cpu=current_platform.is_cpu())
    try:
        engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses the configuration: {error}") from error
    return VllmPrimary(
        engine,
        info,
        max_num_requests=config.max_num_seqs + config.max_num_waiting,
        link_factory=link_factory,
        policy=policy,
        metrics=metrics,
    )


def engine_arguments(model: str, info: PrimaryInfo, config: VllmEngineConfig, *, is_cpu: bool) -> dict[str, Any]:
    """What vLLM's EngineArgs are given. config.engine_args has the last word, but for what drafting stands on."""
    options = TandemOptions(
        primary=info,
        taps=config.taps or (),
        shared_noise=config.sampling == "shared_noise",
        block_length=config.block_length,
        longest_block_length=config.longest_block_length,
        adapts=config.adapts,
        synchronous=config.synchronous,
        draft_timeout_s=config.draft_timeout_s,
        max_num_batched_tokens=config.max_num_batched_tokens,
        representation_memory_bytes=config.representation_memory_bytes,
        prefix_memory_bytes=config.prefix_memory_bytes,
    )
    memory: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if config.kv_cache_tokens is not None:
        num_tokens = config.kv_cache_tokens + _SPARE_TOKENS
        memory = {"kv_cache_memory_bytes": num_tokens * _kv_bytes_per_token(model, config)}
    if config.tensor_parallel_size > 1:
        memory["distributed_executor_backend"] = "mp"  # in a Ray actor vLLM would start actors of its own
    return {
        "dtype": config.dtype,
        "max_model_len": info.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": _is_eager(config),
        "max_logprobs": -1,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,  # text is the router's business
        **memory,
        **config.engine_args,
        "model": str(resolve_folder(model)),
        "async_scheduling": False,  # drafts must be known when a step is scheduled
        "hf_overrides": {"eagle_aux_hidden_state_layer_ids": list(options.taps)},
        "speculative_config": {
            "method": "custom_class",
            "model": f"{_PACKAGE}.worker.NoProposer",
            "num_speculative_tokens": MAX_BLOCK_LENGTH,  # of a sequence in a step, at most
        },
        "worker_cls": f"{_PACKAGE}.cpu_worker.TandemCpuWorker" if is_cpu else f"{_PACKAGE}.gpu_worker.TandemGpuWorker",
        "scheduler_cls": f"{_PACKAGE}.scheduler.TandemScheduler",
        "additional_config": options.to_config(),
    }


def _is_eager(config: VllmEngineConfig) -> bool:
    return not torch.cuda.is_available() if config.enforce_eager is None else config.enforce_eager


def _kv_bytes_per_token(model: str, config: VllmEngineConfig) -> int:
    from tandem_serve.models.config import DecoderConfig
    from tandem_serve.models.folder import read_json

    shape = DecoderConfig.from_hf(read_json(resolve_folder(model) / "config.json"))
    size = 4 if config.dtype == "float32" else 2
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size
