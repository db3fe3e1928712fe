"""The drafting of vLLM's requests: engine/drafting.py's coordinator, fed from a scheduler's steps. Knows no vLLM."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from tandem_serve.decoding.goodput import MeasuredBlockLength
from tandem_serve.engine.drafter_links import DrafterLinks
from tandem_serve.engine.drafting import DraftCoordinator
from tandem_serve.engine.sequence import Sequence as DraftedSequence
from tandem_serve.engine.vllm_primary.options import TandemOptions
from tandem_serve.engine.vllm_primary.prefixes import PrefixRepresentations
from tandem_serve.interfaces import LinkFactory
from tandem_serve.metrics import PrimaryMetrics, WithoutDraft
from tandem_serve.types import DrafterLoad, GenerationRequest

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Selection:
    """What the next step is to do with the requests that decode."""

    held: set[str] = field(default_factory=set)  # not to run: their drafts are under way
    drafts: dict[str, tuple[int, ...]] = field(default_factory=dict)  # to verify, at least one each


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did for one request: rows of the batch, in the order of the outcomes."""

    request_id: str
    start_position: int
    num_rows: int  # positions computed, drafts included
    num_draft_tokens: int
    token_ids: Sequence[int]  # chosen: accepted drafts, then the primary's own; () for a prompt chunk
    block_hashes: Sequence[Hashable]

    @property
    def num_accepted_tokens(self) -> int:
        return max(len(self.token_ids) - 1, 0)

    @property
    def num_verified(self) -> int:
        """Positions that stay."""
        return self.num_rows - self.num_draft_tokens + self.num_accepted_tokens


class RequestDrafting:
    """Mirrors vLLM's requests as sequences that draft. One thread, that of the scheduler; `wake` from any.

    A step: `select` (what to hold back, what to verify), `take` for what really was scheduled, `record` with the
    step's outcomes, `send`. Where there is nothing to run: `wait`, for what has come since `listen`. Nothing here
    raises: an unexpected error costs drafts alone.
    """

    def __init__(
        self,
        options: TandemOptions,
        *,
        link_factory: LinkFactory | None = None,
        policy: MeasuredBlockLength | None = None,
        metrics: PrimaryMetrics | None = None,
        block_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics or PrimaryMetrics()
        self._taps = options.taps
        self._clock = clock
        self._arrived = threading.Event()
        self._links = DrafterLinks(link_factory, options.primary, self.wake)
        self._links.set_addresses(options.drafters)
        self.policy = policy or MeasuredBlockLength(
            options.block_length, options.longest_block_length, adapts=options.adapts
        )
        self._coordinator = DraftCoordinator(
            options,
            options.primary,
            self._links,
            self.policy,
            self.metrics,
            taps=options.taps,
            worth_s=self.policy.longest_wait_s,
        )
        self._synchronous = options.synchronous
        self._prefixes = PrefixRepresentations(block_size, options.prefix_memory_bytes)
        self._sequences: dict[str, DraftedSequence] = {}  # by the drafting request's id, as drafters know them
        self._by_request: dict[str, DraftedSequence] = {}  # by vLLM's
        self._idle_s = 0.0  # spent in `wait` since the last step
        self._ready_until_s: float | None = None  # so long those that are ready wait for others
        self._held: set[str] = set()  # by the last `select`
        self._asked = 0  # the longest block that the present step has waited for
        self.last_step: dict[
            str, tuple[int, int]
        ] = {}  # drafting id: (drafts verified, accepted), where there were any

    # -------------------------------------------------------------- any thread

    def wake(self) -> None:
        """Ends a `wait`. Links call it when something has arrived."""
        self._arrived.set()

    def link_states(self) -> tuple[tuple[str, str], ...]:
        return self._links.states()

    def loads(self) -> tuple[DrafterLoad, ...]:
        return self._links.loads(self._clock())

    # -------------------------------------------------------------- requests

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """The drafters that new sequences may use."""
        with self._costing_drafts_only():
            self._links.set_addresses(addresses)

    def add(self, request_id: str, request: GenerationRequest) -> None:
        """A new request, under vLLM's id. One that a running one's drafting id matches decodes plainly."""
        if request.request_id in self._sequences:
            return
        sequence = DraftedSequence.of(request, lambda item: None, self._clock())
        self._sequences[request.request_id] = self._by_request[request_id] = sequence
        with self._costing_drafts_only():
            self._coordinator.begin(sequence)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests that have ended, however. Unknown ones are ignored."""
        self._ready_until_s = None  # it may have been they that waited: nobody is to wake up for them
        for request_id in request_ids:
            sequence = self._by_request.pop(request_id, None)
            if sequence is not None:
                del self._sequences[sequence.request.request_id]
                with self._costing_drafts_only():
                    self._coordinator.end(sequence)

    # -------------------------------------------------------------- a step

    def listen(self) -> None:
        """What arrives from here on ends the next `wait`. Call it before looking at anything."""
        self._arrived.clear()

    def select(self, decoding: Sequence[str], *, alone: bool = False) -> Selection:
        """Takes in what drafters have sent; says which of the decoding requests run, and with which drafts.

        alone: no prompts run beside them, which nobody should be kept from.
        """
        selection, waits = Selection(), self._synchronous
        with self._costing_drafts_only():
            now_s = self._clock()
            self._coordinator.receive(self._sequences, now_s)
            for request_id in decoding:
                sequence = self._by_request.get(request_id)
                if sequence is None:
                    continue
                if not self._coordinator.is_ready(sequence, now_s):
                    selection.held.add(request_id)
                elif drafts := self._coordinator.peek_drafts(sequence):
                    selection.drafts[request_id] = drafts
            waits = waits or (alone and self._wait_pays(selection, len(decoding), now_s))
        self._held = selection.held
        return Selection(held=set(decoding)) if waits and selection.held else selection

    def _wait_pays(self, selection: Selection, num_decoding: int, now_s: float) -> bool:
        """Whether those that are ready had better wait for drafts on their way, and share a pass with those, too.

        One pass of all takes less than two of some: that much may be waited for, in all.
        """
        num_ready = num_decoding - len(selection.held)
        if not num_ready or not selection.held:
            self._ready_until_s = None
            return False
        held = [self._by_request[request_id] for request_id in selection.held]
        if self._ready_until_s is None:
            now_tokens = num_ready + sum(map(len, selection.drafts.values()))
            later_tokens = sum(1 + self._coordinator.num_asked(sequence) for sequence in held)
            self._ready_until_s = now_s + self.policy.saved_s(now_tokens, later_tokens)
        return max(now_s, *map(self._coordinator.expected_s, held)) < self._ready_until_s

    def take(self, request_ids: Iterable[str]) -> None:
        """Ends the rounds of decoding requests that run in this step, with drafts or without."""
        self._asked = 0
        self._ready_until_s = None
        with self._costing_drafts_only():
            for request_id in request_ids:
                if (sequence := self._by_request.get(request_id)) is not None:
                    self._asked = max(self._asked, self._coordinator.num_asked(sequence))
                    self._coordinator.take_drafts(sequence)

    def record(self, outcomes: Sequence[Outcome], states: Tensor | None) -> None:
        """Adds what a step computed and chose. states [sum of num_rows, num_taps, d_L], on the CPU, or None."""
        row = 0
        self.last_step = {}
        with self._costing_drafts_only():
            for outcome in outcomes:
                own = None if states is None else states[row : row + outcome.num_rows]
                row += outcome.num_rows
                sequence = self._by_request.get(outcome.request_id)
                if sequence is not None:
                    self._advance(sequence, outcome, own)
                if outcome.num_draft_tokens:
                    self.metrics.count_block(outcome.num_draft_tokens, outcome.num_accepted_tokens)
                    self.policy.observe_block(outcome.num_draft_tokens, outcome.num_accepted_tokens)
                    if sequence is not None:
                        counts = outcome.num_draft_tokens, outcome.num_accepted_tokens
                        self.last_step[sequence.request.request_id] = counts

    def observe_step(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """How long a step took. Those with prompt chunks say nothing about the cost of drafts."""
        if outcomes and all(o.token_ids and o.num_rows == o.num_draft_tokens + 1 for o in outcomes):
            self.policy.observe_step(sum(outcome.num_rows for outcome in outcomes), seconds)
            if self._asked:
                self.policy.observe_wait(self._asked, self._idle_s)
        self._idle_s = 0.0

    def send(self) -> None:
        """Tells drafters what they lack, and asks for blocks. Sequences whose round has not been taken do not speak."""
        with self._costing_drafts_only():
            begun = [sequence for sequence in self._sequences.values() if sequence.num_computed]
            self._coordinator.send(begun, self._clock())

    def wait(self, timeout_s: float) -> None:
        """Blocks until something arrives, a round's deadline passes, or for timeout_s."""
        started_s = self._clock()
        held = [self._by_request[request_id] for request_id in self._held if request_id in self._by_request]
        deadline = self._coordinator.earliest_deadline_s(held)  # not of those that vLLM has preempted meanwhile
        for limit in (deadline, self._ready_until_s):
            if limit is not None:
                timeout_s = min(timeout_s, max(limit - started_s, 0.0))
        self._arrived.wait(timeout_s)
        if deadline is not None:
            waited_s = self._clock() - started_s
            self._idle_s += waited_s
            self.metrics.draft_idle.inc(waited_s)

    def close(self) -> None:
        self.finish(list(self._by_request))
        self.send()
        self._links.close()

    # -------------------------------------------------------------- inside

    def _advance(self, sequence: DraftedSequence, outcome: Outcome, states: Tensor | None) -> None:
        end = outcome.start_position + outcome.num_verified
        self._remember(sequence, outcome, states, end)
        sequence.num_computed = max(sequence.num_computed, end)
        if outcome.token_ids:
            sequence.extend(list(outcome.token_ids))
            self._coordinator.drop_round(sequence)  # only where it was preempted, and has caught up by itself

    def _remember(self, sequence: DraftedSequence, outcome: Outcome, states: Tensor | None, end: int) -> None:
        """Logs positions up to `end`: cached ones from the prefixes, then the step's. Some may be known already."""
        spec = sequence.speculation
        if spec is None:
            return
        log, start = spec.log, outcome.start_position
        if start > log.end:
            cached = self._prefixes.read(outcome.block_hashes, log.end, start) if self._taps else None
            if self._taps and cached is None:
                self._coordinator.end(sequence, WithoutDraft.NO_REPRESENTATIONS)
                return
            self._coordinator.record(sequence, self._taps, cached, start - log.end)
        first, num_new = log.end, end - log.end
        if num_new > 0:
            self._coordinator.record(sequence, self._taps, None if states is None else states[first - start :], num_new)
            self._keep_blocks(sequence, outcome.block_hashes, first, end)

    def _keep_blocks(self, sequence: DraftedSequence, hashes: Sequence[Hashable], first: int, end: int) -> None:
        """Puts the blocks that have become whole between two positions where later requests find them."""
        spec, size = sequence.speculation, self._prefixes.block_size
        if spec is None or not self._taps:
            return
        for index in range(first // size, min(end // size, len(hashes))):
            start = index * size
            if start >= spec.log.start and hashes[index] not in self._prefixes:
                block = spec.log.read(start, start + size, self._taps)
                if block is not None:
                    self._prefixes.put(hashes[index], block.clone())

    @contextmanager
    def _costing_drafts_only(self) -> Iterator[None]:
        """An error in here, a bug in a link for example, ends the drafting of all requests; they go on alone."""
        try:
            yield
        except Exception:
            _log.exception("drafting failed; the requests that drafted go on without")
            self._coordinator.end_all(self._sequences.values())
