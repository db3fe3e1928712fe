"""Drafter-invariant sampling inside vLLM: its samplers, with our choice of a token put in front of their argmax.

Requests that ask for noise are submitted as greedy. After vLLM's own logits processors (grammar masks, penalties, bad
words, min_tokens, allowed ids) have run, each of their rows is replaced by one that only the token chosen by
decoding/sampling.py is left in, so that vLLM's greedy choice and its greedy prefix match do the rest. Logprobs are
vLLM's, of the raw logits: they are taken before. Rows of other requests stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.vllm_primary.request_args import noise_sampling
from tandem_serve.types import SamplingParams


def install(runner: Any) -> None:
    """Puts the samplers below in place of a model runner's own."""
    old = runner.sampler
    runner.sampler = SharedNoiseSampler(runner, old.logprobs_mode, old.use_fp64_gumbel)
    if hasattr(runner, "rejection_sampler"):  # the last pipeline rank has one
        runner.rejection_sampler = SharedNoiseRejectionSampler(runner.sampler, runner.speculative_config, runner.device)


class SharedNoiseSampler(Sampler):  # type: ignore[misc]
    """Rows are the batch's requests in order: each one's last position, or the one behind its drafts."""

    def __init__(self, runner: Any, logprobs_mode: Any, use_fp64_gumbel: bool) -> None:
        super().__init__(logprobs_mode, use_fp64_gumbel)
        self._batch = _Batch(runner)
        self.num_draft_tokens: Sequence[int] | None = None  # of each request, while their bonus tokens are sampled

    def apply_logits_processors(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, predict_bonus_token: bool
    ) -> Tensor:
        logits = super().apply_logits_processors(logits, sampling_metadata, predict_bonus_token)
        drafts = self.num_draft_tokens
        rows = [
            (index, sampling, position + (0 if drafts is None else drafts[index]))
            for index, sampling, position in self._batch.requests()
        ]
        return _leave_chosen(logits, rows)


class SharedNoiseRejectionSampler(RejectionSampler):  # type: ignore[misc]
    """Rows are the drafts of the batch's requests in order. The bonus tokens are the sampler's above."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        self.sampler.num_draft_tokens = metadata.num_draft_tokens
        try:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        finally:
            self.sampler.num_draft_tokens = None

    def apply_logits_processors(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, metadata: SpecDecodeMetadata
    ) -> Tensor:
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        counts = metadata.num_draft_tokens
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        rows = [
            (firsts[index] + number, sampling, position + number)
            for index, sampling, position in self.sampler._batch.requests()
            for number in range(counts[index])
        ]
        return _leave_chosen(logits, rows)


class _Batch:
    """The runner's batch: which of its requests choose with noise, and at which position."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner  # its input_batch is made anew once the KV cache is known

    def requests(self) -> list[tuple[int, SamplingParams, int]]:
        """(index in the batch, sampling, position of the next token), drafts not counted. None in a warm-up."""
        batch, states = self._runner.input_batch, self._runner.requests
        found = []
        for index in range(batch.num_reqs):
            params = states[batch.req_ids[index]].sampling_params
            sampling = None if params is None else noise_sampling(params.extra_args)
            if sampling is not None:
                found.append((index, sampling, int(batch.num_tokens_no_spec[index])))
        return found


def _leave_chosen(logits: Tensor, rows: Sequence[tuple[int, SamplingParams, int]]) -> Tensor:
    """Replaces rows of logits [N, V], each (row, sampling, position): 0 for the chosen token, -inf for all others."""
    if not rows:
        return logits
    index = torch.tensor([row for row, _, _ in rows], device=logits.device)
    how = SamplingRows.from_params([(sampling, position) for _, sampling, position in rows], logits.device)
    chosen = choose_token_ids(logits[index], how).token_ids
    logits[index] = -torch.inf
    logits[index, chosen] = 0.0
    return logits
