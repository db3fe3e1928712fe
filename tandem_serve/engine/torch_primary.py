"""The embedded primary engine: continuous batching with speculative verification, as a plain synchronous loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.decoding.block_policy import LearningPolicy, Round, StepSize
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.engine.choosing import TokenChooser, Verified, token_logprobs
from tandem_serve.engine.drafter_links import DrafterLinks
from tandem_serve.engine.drafting import DraftCoordinator
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBudget, KvBuffer
from tandem_serve.engine.scheduler import Run, Scheduler
from tandem_serve.engine.sequence import Sequence, Sink
from tandem_serve.engine.telemetry import RequestTelemetry
from tandem_serve.engine.validation import check_request
from tandem_serve.errors import DeadlineExceeded, InvalidRequest, Overloaded, TandemError, Unavailable
from tandem_serve.interfaces import LinkFactory
from tandem_serve.metrics import PrimaryMetrics
from tandem_serve.models.decoder import Decoder
from tandem_serve.tracing import SpanSink, discard
from tandem_serve.types import (
    MAX_BLOCK_LENGTH,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    PrimaryStatus,
    TokenLogprob,
)

_log = logging.getLogger(__name__)

TIE_MARGIN = 5e-4  # raw logits; float32 sums differ by about 1e-5 between batch shapes, so this is ample


class TorchPrimary:
    """Owns ML, its KV cache and the truth about every token.

    `submit`, `abort`, `set_drafters`, `status` and `wake` are safe from any thread; everything else happens in `step`,
    always on one thread. One step: take in what has arrived, admit, run one ragged forward pass over everything that is
    ready, choose and emit tokens, tell the drafters. A step never waits; `wait` does, between steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        info: PrimaryInfo,
        config: PrimaryEngineConfig,
        *,
        link_factory: LinkFactory | None = None,
        policy: LearningPolicy | None = None,
        metrics: PrimaryMetrics | None = None,
        spans: SpanSink = discard,
        tie_margin: float | None = None,  # None: TIE_MARGIN in float32; 0 elsewhere, where nothing is exact anyway
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.metrics = metrics or PrimaryMetrics()
        self.num_failed_steps = 0  # in a row; one that carries sequences forward starts the count over
        self._decoder = decoder
        self._config = config
        self._clock = clock
        self._budget = KvBudget(config.kv_cache_tokens, config.kv_block_size)
        self._scheduler = Scheduler(config, self._budget)
        default = TIE_MARGIN if decoder.dtype is torch.float32 else 0.0
        tie_margin = default if tie_margin is None else tie_margin
        self._telemetry = RequestTelemetry(self.metrics, spans, clock)
        self._chooser = TokenChooser(decoder, tie_margin, self.metrics.near_ties)
        self._wake = threading.Event()
        self._links = DrafterLinks(link_factory, info, self.wake)
        self._policy = policy or RequestedPolicy(config.block_length, config.policy, MAX_BLOCK_LENGTH)
        self._drafting = DraftCoordinator(config, info, self._links, self._policy, self.metrics)
        self.metrics.drafters_known.set_function(lambda: len(self._links.states()))
        self.metrics.drafters_ready.set_function(lambda: sum(state == "ready" for _, state in self._links.states()))
        self._sequences: dict[str, Sequence] = {}  # waiting and running
        self._lock = threading.Lock()  # guards the next four
        self._idle = threading.Condition(self._lock)  # some request has finished
        self._inbox: deque[Callable[[], None]] = deque()
        self._request_ids: set[str] = set()
        self._is_closed = False

    # -------------------------------------------------------------- any thread

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Queues a request; `sink` gets its steps, on the engine's thread.

        Raises:
            InvalidRequest: it can never be served; `field` says why.
            Overloaded: max_num_seqs + max_num_waiting requests are unfinished.
            Unavailable: the engine is closed.
        """
        check_request(
            request,
            vocab_size=self.info.vocab_size,
            max_model_len=self.info.max_model_len,
            kv_cache_tokens=self._budget.capacity_tokens,
        )
        sequence = Sequence.of(request, sink, self._clock())
        with self._lock:
            if self._is_closed:
                raise Unavailable("this primary is closing")
            if request.request_id in self._request_ids:
                raise InvalidRequest(f"request_id {request.request_id!r} is already running", field="request_id")
            if len(self._request_ids) >= self._config.max_num_seqs + self._config.max_num_waiting:
                raise Overloaded(f"{len(self._request_ids)} requests are running or waiting on this primary")
            self._request_ids.add(request.request_id)
            self._inbox.append(lambda: self._enqueue(sequence))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """Ends a request; its sink gets a last step with ABORT. Unknown and finished ones are ignored."""
        self._post(lambda: self._abort(request_id))

    def set_drafters(self, addresses: Iterable[str]) -> None:
        """The drafters that new sequences may use. Sequences at others stay there while those last."""
        wanted = tuple(addresses)
        self._post(lambda: self._links.set_addresses(wanted))

    def status(self) -> PrimaryStatus:
        num_unfinished, num_running = len(self._request_ids), len(self._scheduler.running)
        return PrimaryStatus(
            num_requests_running=num_running,
            num_requests_waiting=max(num_unfinished - num_running, 0),
            kv_cache_usage=self._budget.usage,
            drafters=self._links.states(),
            loads=self._links.loads(self._clock()),
        )

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Blocks until no request is unfinished, or for timeout_s. For threads other than the one that steps."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._request_ids, timeout_s)

    def wake(self) -> None:
        """Ends a `wait`. Links call it when something has arrived."""
        self._wake.set()

    def _post(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._inbox.append(action)
        self._wake.set()

    # -------------------------------------------------------------- the engine's thread

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._request_ids)

    def run_until_idle(self) -> None:
        """Steps on the caller's thread until every request has finished."""
        while self.has_work:
            if not self.step():
                self.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until something arrives or the earliest draft deadline passes. Call when a step did nothing."""
        deadline = self._drafting.earliest_deadline_s(self._scheduler.running)
        if deadline is not None:
            left = max(deadline - self._clock(), 0.0)
            timeout_s = left if timeout_s is None else min(left, timeout_s)
        started = self._clock()
        self._wake.wait(timeout_s)
        if deadline is not None:
            self.metrics.draft_idle.inc(self._clock() - started)

    @torch.inference_mode()
    def step(self) -> bool:
        """One step as the class describes it. False where there was nothing to do: then `wait`."""
        self._wake.clear()  # before anything is read, so that what arrives from here on is not missed
        self._drain_inbox()
        now = self._clock()
        for late in [sequence for sequence in self._sequences.values() if sequence.deadline_s <= now]:
            self._fail(late, DeadlineExceeded("the request's time is up"))
        with self._costing_drafts_only():
            self._drafting.receive(self._sequences, now)
        admitted = self._scheduler.admit()
        for sequence in admitted:
            self._begin(sequence)
        opening = [s for s in admitted if not s.is_prefilling]  # a drafter opens with their only token
        has_sent = bool(opening) and self._send(opening)
        has_adopted = self._adopt_drafts(now)
        runs = self._scheduler.select(
            lambda s: not s.num_unverified and self._drafting.is_ready(s, now), self._drafting.take_drafts
        )
        has_run = False
        if runs:
            size, started = _step_size(runs), self._clock()
            has_run = self._run_or_fail(runs, size)
            if has_run:
                with self._costing_drafts_only():
                    self._policy.observe_step(size, self._clock() - started)
            elapsed = self._clock() - now
            self.metrics.step_time.observe(elapsed)
            if size.num_draft_steps:
                self.metrics.verify_time.observe(elapsed)
        has_sent |= self._send(self._scheduler.running)
        self._set_gauges()
        self.metrics.busy.inc(max(self._clock() - now, 0.0))
        if has_run:
            self.num_failed_steps = 0
        return bool(runs) or has_sent or has_adopted

    def _send(self, sequences: Collection[Sequence]) -> bool:
        """Tells the drafters what they lack. True where anything went out."""
        has_sent = True  # should this fail, sequences that waited for drafts are ready
        with self._costing_drafts_only():
            has_sent = self._drafting.send(sequences, self._clock())
        return has_sent

    def fail_all(self) -> None:
        """Ends every request with Unavailable: something outside a batch went wrong, on nobody knows whose account."""
        self._drain_inbox()
        for sequence in list(self._sequences.values()):
            self._fail(sequence)

    def close(self) -> None:
        """Aborts what is left and closes the links. No step may follow."""
        with self._lock:
            self._is_closed = True
        self._drain_inbox()
        for request_id in list(self._sequences):
            self._abort(request_id)
        with self._costing_drafts_only():
            self._drafting.send((), self._clock())
        self._links.close()

    # -------------------------------------------------------------- requests

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _enqueue(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.request_id] = sequence
        self._scheduler.waiting.append(sequence)

    def _begin(self, sequence: Sequence) -> None:
        decoder = self._decoder
        self._telemetry.admitted(sequence)
        try:
            sequence.kv = KvBuffer(decoder.config, sequence.reserved_tokens, decoder.dtype, decoder.device)
        except RuntimeError:  # the budget was set higher than the memory there is
            _log.exception("no memory for %d tokens of KV cache", sequence.reserved_tokens)
            self._fail(sequence)
        else:
            self._drafting.begin(sequence)

    def _abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.ABORT)
            self._emit(sequence, GenerationStep(request_id, (), finish_reason=FinishReason.ABORT))

    def _fail(self, sequence: Sequence, error: TandemError | None = None) -> None:
        """Ends a request that an error has hit. None: one of ours; the text can be continued elsewhere."""
        if sequence.request.request_id in self._sequences:
            self._end(sequence, FinishReason.ABORT)
            try:
                sequence.sink(error or Unavailable("the primary's engine failed in a step; see its log"))
            except Exception:
                _log.exception("the sink of %s failed", sequence.request.request_id)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        with self._costing_drafts_only():
            self._drafting.end(sequence)
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]
        with self._lock:
            self._request_ids.discard(sequence.request.request_id)
            self._idle.notify_all()
        self._telemetry.ended(sequence, reason)

    def _emit(self, sequence: Sequence, step: GenerationStep) -> None:
        """A sink that raises has lost its reader: the request ends."""
        try:
            sequence.sink(step)
        except Exception:
            _log.exception("the sink of %s failed; aborting it", sequence.request.request_id)
            if sequence.request.request_id in self._sequences:
                self._end(sequence, FinishReason.ABORT)

    @contextmanager
    def _costing_drafts_only(self) -> Iterator[None]:
        """An error in here, a bug in a link for example, ends the drafting of all sequences; they go on alone."""
        try:
            yield
        except Exception:
            _log.exception("drafting failed; the sequences that drafted go on without")
            self._drafting.end_all(self._sequences.values())

    def _set_gauges(self) -> None:
        self.metrics.running.set(len(self._scheduler.running))
        self.metrics.waiting.set(len(self._scheduler.waiting))
        self.metrics.waiting_tokens.set(sum(waiting.num_prompt_tokens for waiting in self._scheduler.waiting))
        self.metrics.kv_cache_usage.set(self._budget.usage)

    # -------------------------------------------------------------- standalone tandem

    def _adopt_drafts(self, now_s: float) -> bool:
        """Makes text of the drafts of standalone sequences. A block that is full, or stays without drafts, is closed:
        the primary runs it. True where there were any: should nothing more be asked for, the next step closes theirs.
        """
        has_adopted = False
        for sequence in [s for s in self._scheduler.running if s.is_standalone and not s.is_prefilling]:
            is_open = sequence.num_unverified or self._drafting.peek_drafts(sequence)
            if not is_open or not self._drafting.is_ready(sequence, now_s):
                continue
            drafts = self._drafting.take_drafts(sequence)
            if drafts:
                self._grow(sequence, list(drafts), len(drafts), len(drafts), None)
                sequence.num_unverified += len(drafts)
                has_adopted = True
            if not drafts or sequence.num_unverified >= self._drafting.block_length(sequence):
                sequence.close_block()
        return has_adopted

    # -------------------------------------------------------------- one forward pass

    def _run_or_fail(self, runs: list[Run], size: StepSize) -> bool:
        """Whether the runs went well. Where not, their requests have failed, and no others."""
        try:
            self._run(runs, size)
        except Exception:
            _log.exception("a step failed; its %d requests fail with it", len(runs))
            self.metrics.failed_steps.inc()
            self.num_failed_steps += 1
            for run in runs:
                self._fail(run.sequence)
            return False
        return True

    def _run(self, runs: list[Run], size: StepSize) -> None:
        """Computes the runs in one batch and carries each sequence forward."""
        logs = (run.sequence.speculation for run in runs)
        taps = tuple(sorted({tap for spec in logs if spec is not None for tap in spec.log.taps}))
        rows = [Rows(_kv(run.sequence), run.sequence.num_computed, run.token_ids, run.num_logits) for run in runs]
        output = forward(self._decoder, rows, taps)
        outcomes = self._chooser.verify(runs, output.logits)
        logits = output.logits.split([run.num_logits for run in runs])
        if output.taps is None:
            states: Iterable[Tensor | None] = [None] * len(runs)
        else:
            states = output.taps.split([len(run.token_ids) for run in runs])
        for run, run_states, outcome, run_logits in zip(runs, states, outcomes, logits, strict=True):
            num_verified = len(run.token_ids) - len(run.draft_token_ids) + outcome.num_accepted_tokens
            run.sequence.num_computed += num_verified
            self._drafting.record(run.sequence, taps, run_states, num_verified)
            if run.num_logits:
                self._advance(run, outcome, run_logits, size)
            if run.sequence.num_computed <= run.sequence.num_prompt_tokens:
                self.metrics.prompt_tokens.inc(num_verified)

    def _advance(self, run: Run, outcome: Verified, logits: Tensor, size: StepSize) -> None:
        """Adds what a run has yielded to its sequence. logits [G + 1, V] are those that chose it."""
        sequence, num_drafts, num_accepted = run.sequence, len(run.draft_token_ids), outcome.num_accepted_tokens
        spec = sequence.speculation
        draft_s = None if spec is None or sequence.is_standalone else spec.draft_s
        if draft_s is not None and sequence.last_token_at_s is not None:
            seconds = self._clock() - sequence.last_token_at_s
            outcome_of_round = Round(num_drafts, num_accepted, size, draft_s, seconds)
            with self._costing_drafts_only():
                self._policy.observe_round(sequence.request, outcome_of_round)
        self._grow(sequence, outcome.token_ids, num_accepted, num_drafts, logits)

    def _grow(
        self, sequence: Sequence, token_ids: list[int], num_accepted: int, num_drafts: int, logits: Tensor | None
    ) -> None:
        """Emits a sequence's new tokens, accepted drafts first, and ends it where they do. No logits: unverified."""
        request = sequence.request
        token_ids, finish_reason = sequence.extend(token_ids)
        num_accepted = min(num_accepted, len(token_ids))
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.num_logprobs is not None and logits is not None:
            logprobs = token_logprobs(logits[: len(token_ids)], token_ids, request.num_logprobs)
        self._telemetry.emitted(sequence, len(token_ids), 0 if logits is None else num_drafts, num_accepted)
        if finish_reason is not None:
            self._end(sequence, finish_reason)
        self._emit(
            sequence,
            GenerationStep(
                request_id=request.request_id,
                token_ids=tuple(token_ids),
                num_accepted_tokens=num_accepted,
                num_draft_tokens=num_drafts,
                logprobs=logprobs,
                finish_reason=finish_reason,
            ),
        )


def _step_size(runs: Collection[Run]) -> StepSize:
    return StepSize(
        num_draft_steps=max(len(run.draft_token_ids) for run in runs),
        num_sequences=len(runs),
        num_tokens=sum(len(run.token_ids) for run in runs),
        has_prompts=any(len(run.token_ids) > run.num_logits for run in runs),
    )


def _kv(sequence: Sequence) -> KvBuffer:
    if sequence.kv is None:
        raise RuntimeError(f"{sequence.request.request_id} runs without memory")
    return sequence.kv
