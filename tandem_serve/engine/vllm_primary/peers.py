"""vLLM without tandem: plain, or with a speculative method of its own. What benchmarks compare with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from tandem_serve.types import GenerationStep, SamplingParams


class StockVllm:
    """A vLLM engine in this process with nothing of ours in it; completes a wave of prompts at once."""

    def __init__(self, model: str, *, dtype: str, max_model_len: int, speculative: dict[str, Any] | None) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import vllm

        self._vllm = vllm
        arguments = vllm.EngineArgs(
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=32,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 30,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            async_scheduling=False,
            speculative_config=speculative,
        )
        self._engine = vllm.LLMEngine.from_engine_args(arguments)

    def complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        sampling: Sequence[SamplingParams],
        deliver: Callable[[int, GenerationStep, float], None],
    ) -> None:
        """Runs all prompts together. `deliver` gets (prompt, step, time); vLLM does not say how much it drafted."""
        from vllm.sampling_params import RequestOutputKind

        for index, (prompt, how) in enumerate(zip(prompts, sampling, strict=True)):
            params = self._vllm.SamplingParams(
                temperature=how.temperature,
                seed=how.seed if how.temperature else None,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                token_ids = tuple(output.outputs[0].token_ids)
                if token_ids:
                    step = GenerationStep(output.request_id, token_ids)
                    deliver(int(output.request_id), step, now_s)
