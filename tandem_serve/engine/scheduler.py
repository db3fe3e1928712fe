"""Which sequences hold memory, and which of them run in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.kv_cache import KvBudget
from tandem_serve.engine.sequence import Sequence


class Run(NamedTuple):
    """One sequence's part of a step: token_ids at positions sequence.num_computed and on.

    A prompt chunk, or the sequence's last token followed by its drafts. num_logits of the last rows are needed.
    """

    sequence: Sequence
    token_ids: list[int]
    draft_token_ids: tuple[int, ...]
    num_logits: int


class Scheduler:
    """First come, first served; admission by reservation.

    A sequence is admitted once KV memory for its prompt and max_tokens is set aside, so a running one never lacks
    memory and is never preempted. A step verifies every sequence that is ready, least recently run first, and
    fills up with prompt chunks; it waits for nobody.
    """

    def __init__(self, config: PrimaryEngineConfig, budget: KvBudget) -> None:
        self._config = config
        self._budget = budget
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # ordered: least recently run first

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences to running while there is room. Returns them: their buffers are to be allocated."""
        admitted = []
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            need = self._budget.round_up(sequence.num_prompt_tokens + sequence.request.max_tokens)
            if not self._budget.try_reserve(need):
                break
            sequence.reserved_tokens = need
            self.running[self.waiting.popleft()] = None
            admitted.append(sequence)
        return admitted

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, with its memory."""
        if sequence in self.running:
            del self.running[sequence]
            self._budget.release(sequence.reserved_tokens)
            sequence.kv = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def select(
        self, is_ready: Callable[[Sequence], bool], take_drafts: Callable[[Sequence], tuple[int, ...]]
    ) -> list[Run]:
        """The next step's runs, within max_num_batched_tokens; empty where nobody is ready.

        Args:
            is_ready: whether a decoding sequence need not wait for its drafts.
            take_drafts: its drafts, or none; called once, for each sequence that runs.
        """
        prefilling, ready = [], []
        for sequence in self.running:
            if sequence.is_prefilling:
                prefilling.append(sequence)
            elif is_ready(sequence):
                ready.append(sequence)
        budget = self._config.max_num_batched_tokens
        num_left = budget - (budget // 4 if prefilling else 0)  # prompts are not starved by many decoding sequences
        runs = []
        for sequence in ready:
            if num_left <= 0:
                break
            drafts = take_drafts(sequence)[: num_left - 1]
            runs.append(Run(sequence, [sequence.token_ids[-1], *drafts], drafts, len(drafts) + 1))
            num_left -= len(drafts) + 1
            self.running[sequence] = self.running.pop(sequence)  # to the end of the line
        num_left = budget - sum(len(run.token_ids) for run in runs)
        for sequence in prefilling:
            if num_left <= 0:
                break
            runs.append(_due_chunk(sequence, num_left))
            num_left -= len(runs[-1].token_ids)
        return runs


def _due_chunk(sequence: Sequence, num_tokens: int) -> Run:
    start = sequence.num_computed
    end = min(start + num_tokens, sequence.num_due)
    is_last = end == sequence.num_due
    return Run(sequence, sequence.token_ids[start:end], (), int(is_last and sequence.primary_opens_blocks))
