"""vLLM behind the same face as engine/torch_primary.py: one thread steps it, requests come by submit."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

from vllm import LLMEngine, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind

from tandem_serve.decoding.goodput import MeasuredBlockLength
from tandem_serve.engine.sequence import Sink
from tandem_serve.engine.validation import check_request
from tandem_serve.engine.vllm_primary.request_args import extra_args
from tandem_serve.engine.vllm_primary.request_drafting import RequestDrafting
from tandem_serve.engine.vllm_primary.scheduler import TandemScheduler
from tandem_serve.errors import InvalidRequest, Overloaded, TandemError, Unavailable
from tandem_serve.interfaces import LinkFactory
from tandem_serve.metrics import PrimaryMetrics
from tandem_serve.types import (
    FinishReason,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    PrimaryStatus,
    TokenLogprob,
)

_log = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
STALL_S = 0.05  # between looks at requests that neither run nor wait for drafts


class VllmPrimary:
    """Owns a vLLM engine in this process (its workers may be others) and the drafting of its requests.

    `submit`, `abort`, `set_drafters`, `status` and `wake` are safe from any thread; everything else happens in `step`,
    always on one thread. A step never waits for drafts; `wait` does, between steps.
    """

    def __init__(
        self,
        engine: LLMEngine,
        info: PrimaryInfo,
        *,
        max_num_requests: int,
        link_factory: LinkFactory | None = None,
        policy: MeasuredBlockLength | None = None,
        metrics: PrimaryMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.metrics = metrics or PrimaryMetrics()
        self.num_failed_steps = 0  # in a row
        self._engine = engine
        self._scheduler = cast(TandemScheduler, engine.engine_core.engine_core.scheduler)
        self._max_num_requests = max_num_requests
        self._clock = clock
        options, cache = self._scheduler.options, engine.vllm_config.cache_config
        self._shared_noise = options.shared_noise
        num_blocks = self._scheduler.kv_cache_config.num_blocks - 1  # vLLM keeps one for itself
        self._kv_cache_tokens = int(num_blocks * cache.block_size)
        self._drafting = RequestDrafting(
            options,
            link_factory=link_factory,
            policy=policy,
            metrics=self.metrics,
            block_size=self._scheduler.hash_block_size,
            clock=clock,
        )
        self._scheduler.attach(self._drafting)
        self._running: dict[str, _Running] = {}  # handed to vLLM
        self._lock = threading.Lock()  # guards the next four
        self._idle = threading.Condition(self._lock)  # some request has finished
        self._inbox: deque[Callable[[], None]] = deque()
        self._request_ids: set[str] = set()
        self._is_closed = False

    # -------------------------------------------------------------- any thread

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Queues a request; `sink` gets its steps, on the engine's thread. Raises as TorchPrimary.submit.

        There is no standalone tandem: vLLM verifies every draft.
        """
        check_request(
            request,
            vocab_size=self.info.vocab_size,
            max_model_len=self.info.max_model_len,
            kv_cache_tokens=self._kv_cache_tokens,
        )
        if request.mode.is_standalone:
            raise InvalidRequest(f"mode = {request.mode}: vLLM's engine verifies every draft", field="mode")
        arrived_at_s = self._clock()
        with self._lock:
            if self._is_closed:
                raise Unavailable("this primary is closing")
            if request.request_id in self._request_ids:
                raise InvalidRequest(f"request_id {request.request_id!r} is already running", field="request_id")
            if len(self._request_ids) >= self._max_num_requests:
                raise Overloaded(f"{len(self._request_ids)} requests are running or waiting on this primary")
            self._request_ids.add(request.request_id)
            self._inbox.append(lambda: self._begin(request, sink, arrived_at_s))
        self.wake()

    def abort(self, request_id: str) -> None:
        """Ends a request; its sink gets a last step with ABORT. Unknown and finished ones are ignored."""
        self._post(lambda: self._abort(request_id))

    def set_drafters(self, addresses: Iterable[str]) -> None:
        """The drafters that new sequences may use. Sequences at others stay there while those last."""
        wanted = tuple(addresses)
        self._post(lambda: self._drafting.set_addresses(wanted))

    def status(self) -> PrimaryStatus:
        num_running, _ = self._scheduler.get_request_counts()
        return PrimaryStatus(
            num_requests_running=num_running,
            num_requests_waiting=max(len(self._request_ids) - num_running, 0),
            kv_cache_usage=self._scheduler.get_kv_cache_usage(),
            drafters=self._drafting.link_states(),
            loads=self._drafting.loads(),
        )

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Blocks until no request is unfinished, or for timeout_s. For threads other than the one that steps."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._request_ids, timeout_s)

    def wake(self) -> None:
        """Ends a `wait`."""
        self._drafting.wake()

    def _post(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._inbox.append(action)
        self.wake()

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
        longest_s = STALL_S if self._running else LONGEST_WAIT_S
        self._drafting.wait(longest_s if timeout_s is None else min(timeout_s, longest_s))

    def step(self) -> bool:
        """Takes in what has arrived, then one step of vLLM's. False where there was nothing to do: then `wait`."""
        self._drafting.listen()
        has_news = self._drain_inbox()
        if not self._running or self._scheduler.must_wait():
            self._drafting.send()  # what has ended, or waited for credit
            return has_news
        started_s = self._clock()
        try:
            outputs = cast(list[RequestOutput], self._engine.step())
        except Exception:  # who steps counts it, and ends all requests: fail_all
            self.metrics.failed_steps.inc()
            raise
        self.num_failed_steps = 0
        self.metrics.step_time.observe(self._clock() - started_s)
        for output in outputs:
            self._emit(output)
        self._set_gauges()
        return bool(outputs) or self._scheduler.has_run

    def fail_all(self) -> None:
        """Ends every request with Unavailable: vLLM has raised, on nobody knows whose account."""
        self._end_all(lambda _: Unavailable("the primary's engine failed in a step; see its log"))

    def close(self) -> None:
        """Aborts what is left and shuts vLLM down. No step may follow."""
        with self._lock:
            self._is_closed = True
        self._end_all(lambda request_id: GenerationStep(request_id, (), finish_reason=FinishReason.ABORT))
        self._engine.engine_core.shutdown()

    # -------------------------------------------------------------- requests

    def _drain_inbox(self) -> bool:
        """Whether there was anything."""
        has_news = bool(self._inbox)
        while self._inbox:
            self._inbox.popleft()()
        return has_news

    def _begin(self, request: GenerationRequest, sink: Sink, arrived_at_s: float) -> None:
        running = _Running(request, sink, arrived_at_s)
        self._running[request.request_id] = running
        try:
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
            self._engine.add_request(request.request_id, prompt, self._sampling_params(request))
        except Exception as error:  # what vLLM refuses of what we let pass
            _log.exception("vLLM refused %s", request.request_id)
            with suppress(Exception):  # it may have got half of the way
                self._engine.abort_request([request.request_id])
            self._end(request.request_id, FinishReason.ABORT)
            self._deliver(running, InvalidRequest(f"vLLM refused the request: {error}"))

    def _sampling_params(self, request: GenerationRequest) -> SamplingParams:
        sampling = request.sampling
        own: dict[str, Any] = {"temperature": 0.0}
        if not self._shared_noise and sampling.temperature > 0:
            own = {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "seed": sampling.seed,
            }
        return SamplingParams(
            **own,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,  # the model's own end-of-text ids are among stop_token_ids where they are wanted
            logprobs=request.num_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args(request, shared_noise=self._shared_noise),
        )

    def _abort(self, request_id: str) -> None:
        running = self._running.get(request_id)
        if running is not None:
            self._engine.abort_request([request_id])
            self._end(request_id, FinishReason.ABORT)
            self._deliver(running, GenerationStep(request_id, (), finish_reason=FinishReason.ABORT))

    def _end_all(self, last: Callable[[str], GenerationStep | TandemError]) -> None:
        """Ends every request; `last` is what its sink hears."""
        self._drain_inbox()
        for request_id, running in list(self._running.items()):
            with suppress(Exception):  # whatever state a broken step has left it in
                self._engine.abort_request([request_id])
            self._end(request_id, FinishReason.ABORT)
            self._deliver(running, last(request_id))

    def _emit(self, output: RequestOutput) -> None:
        running = self._running.get(output.request_id)
        if running is None:
            return
        completion = output.outputs[0]
        token_ids = tuple(completion.token_ids)
        num_drafts, num_accepted = self._drafting.last_step.get(output.request_id, (0, 0))
        reason = _REASONS.get(completion.finish_reason, FinishReason.ABORT) if output.finished else None
        if token_ids and not running.has_begun:
            running.has_begun = True
            self.metrics.time_to_first_token.observe(self._clock() - running.arrived_at_s)
            self.metrics.prompt_tokens.inc(len(running.request.prompt_token_ids))
        self.metrics.generation_tokens.inc(len(token_ids))
        if reason is not None:
            self._end(output.request_id, reason)
        step = GenerationStep(
            request_id=output.request_id,
            token_ids=token_ids,
            num_accepted_tokens=min(num_accepted, len(token_ids)),
            num_draft_tokens=num_drafts,
            logprobs=_logprobs(completion, running.request.num_logprobs),
            finish_reason=reason,
        )
        if not self._deliver(running, step) and reason is None:
            self._engine.abort_request([output.request_id])
            self._end(output.request_id, FinishReason.ABORT)

    def _deliver(self, running: _Running, item: GenerationStep | TandemError) -> bool:
        """A sink that raises has lost its reader."""
        try:
            running.sink(item)
        except Exception:
            _log.exception("the sink of %s failed", running.request.request_id)
            return False
        return True

    def _end(self, request_id: str, reason: FinishReason) -> None:
        del self._running[request_id]
        with self._lock:
            self._request_ids.discard(request_id)
            self._idle.notify_all()
        self.metrics.finished.labels(reason.value).inc()

    def _set_gauges(self) -> None:
        num_running, num_waiting = self._scheduler.get_request_counts()
        self.metrics.running.set(num_running)
        self.metrics.waiting.set(num_waiting)
        self.metrics.kv_cache_usage.set(self._scheduler.get_kv_cache_usage())


_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class _Running:
    """A request that vLLM has."""

    __slots__ = ("arrived_at_s", "has_begun", "request", "sink")

    def __init__(self, request: GenerationRequest, sink: Sink, arrived_at_s: float) -> None:
        self.request = request
        self.sink = sink
        self.arrived_at_s = arrived_at_s
        self.has_begun = False


def _logprobs(completion: Any, num_logprobs: int | None) -> tuple[TokenLogprob, ...]:
    """vLLM's logprobs of a delta: the chosen token's, and the num_logprobs likeliest."""
    if num_logprobs is None or not completion.logprobs:
        return ()
    return tuple(
        _token_logprob(token_id, found, num_logprobs)
        for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True)
    )


def _token_logprob(token_id: int, found: Mapping[int, Any], num_top: int) -> TokenLogprob:
    ranked = sorted((each.rank, other, each.logprob) for other, each in found.items())
    top = tuple((other, logprob) for rank, other, logprob in ranked if rank <= num_top)
    return TokenLogprob(token_id, found[token_id].logprob, top[:num_top])
