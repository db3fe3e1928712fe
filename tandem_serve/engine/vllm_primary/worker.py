"""What a vLLM worker does for tandem: it hands the taps out beside the sampled tokens, and samples with shared noise.

cpu_worker.py and gpu_worker.py mix this into vLLM's own workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tandem_serve.engine.vllm_primary.options import TandemOptions
from tandem_serve.engine.vllm_primary.requirements import check_runner

STATES = "tandem_states"  # on a ModelRunnerOutput: [rows of the batch, num_taps, d_L] on the CPU


class NoProposer:
    """vLLM's `custom_class` proposer: drafts come to the scheduler, from another machine, and not to the worker."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[] for _ in sampled_token_ids]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        pass


class TandemWorker:
    """Mixed into a vLLM worker, before it."""

    vllm_config: Any
    model_runner: Any
    is_driver_worker: bool  # under tensor parallelism one rank alone: the one whose output is used

    def init_device(self) -> None:
        """Makes the model runner, then adds what is ours: before the model is loaded, so that it gives out taps."""
        super().init_device()  # type: ignore[misc]
        from tandem_serve.engine.vllm_primary import sampling

        options = TandemOptions.from_config(self.vllm_config.additional_config)
        check_runner(self.model_runner)
        self.model_runner.use_aux_hidden_state_outputs = bool(options.taps)
        if options.shared_noise:
            sampling.install(self.model_runner)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's own; its output carries the step's taps as well."""
        state = self.model_runner.execute_model_state
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self.is_driver_worker and state is not None and state.aux_hidden_states:
            num_rows = state.scheduler_output.total_num_scheduled_tokens
            setattr(output, STATES, _on_cpu(state.aux_hidden_states, num_rows))
        return output


def _on_cpu(taps: list[Tensor], num_rows: int) -> Tensor:
    """One [rows + padding, d_L] tensor a tap as [rows, num_taps, d_L] in host memory."""
    return torch.stack([tap[:num_rows] for tap in taps], 1).cpu()
