"""vLLM's scheduler, for requests whose drafts come from elsewhere and may not be there yet."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tandem_serve.engine.vllm_primary.options import TandemOptions
from tandem_serve.engine.vllm_primary.request_args import drafting_request
from tandem_serve.engine.vllm_primary.request_drafting import Outcome, RequestDrafting
from tandem_serve.engine.vllm_primary.requirements import check_scheduler
from tandem_serve.engine.vllm_primary.worker import STATES

LONGEST_WAIT_S = (
    0.005  # of a step in which everybody waits for drafts, in vLLM's own loop: new requests come in between
)


class TandemScheduler(Scheduler):  # type: ignore[misc]
    """Holds a request back while its drafts are under way, at most to their deadline; others verify meanwhile.

    Held back means: vLLM passes it over for one step (`next_decode_eligible_step`); it keeps its memory and its place.
    `drafting` is made from additional_config; a front end in the same process puts its own there (`attach`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_scheduler(self)
        self.options = TandemOptions.from_config(self.vllm_config.additional_config)
        self.hash_block_size: int = kwargs.get("hash_block_size") or kwargs["block_size"]
        self.has_run = False  # whether the latest step had anything to run
        self._began_s = 0.0  # the present step
        self.waits = True  # in `schedule`; False where a front end waits by itself
        self.drafting = RequestDrafting(
            self.options, link_factory=self.options.make_link_factory(), block_size=self.hash_block_size
        )

    def attach(self, drafting: RequestDrafting) -> None:
        """Uses this from now on, and leaves the waiting to its owner. Before the first request."""
        self.drafting.close()
        self.drafting = drafting
        self.waits = False

    # -------------------------------------------------------------- vLLM's interface

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if is_new and request.sampling_params is not None and request.prompt_token_ids is not None:
            drafted = drafting_request(
                request.request_id, request.prompt_token_ids, request.max_tokens, request.sampling_params.extra_args
            )
            self.drafting.add(request.request_id, drafted)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        self.drafting.finish(request.request_id for request in finished)
        return finished

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.waits:
            self.drafting.listen()
            if self.must_wait():
                self.drafting.wait(LONGEST_WAIT_S)
        self._began_s = time.monotonic()
        decoding = [request for request in self.running if _decodes(request)]
        alone = len(decoding) == len(self.running) and not self.waiting
        selection = self.drafting.select([request.request_id for request in decoding], alone=alone)
        self.drafting.metrics.hold_backs.inc(len(selection.held))
        for request in decoding:
            if request.request_id in selection.held:
                request.next_decode_eligible_step = self.current_step + 2  # `schedule` counts up first
        drafts = [list(ids) for ids in selection.drafts.values()]
        super().update_draft_token_ids(DraftTokenIds(list(selection.drafts), drafts))
        output = super().schedule(throttle_prefills)
        self.has_run = output.total_num_scheduled_tokens > 0
        for request_id in selection.drafts:  # who has not run is asked again
            if request_id not in output.num_scheduled_tokens and request_id in self.requests:
                self.requests[request_id].spec_token_ids = []
        ids = (request.request_id for request in decoding if request.status is RequestStatus.RUNNING)
        self.drafting.take(request_id for request_id in ids if request_id in output.num_scheduled_tokens)
        return output

    def must_wait(self) -> bool:
        """Whether every request is decoding and has drafts under way: there is nothing to run."""
        if self.waiting or self.kv_holding_waiting or not self.running or self.finished_req_ids:
            return False
        decoding = [request.request_id for request in self.running if _decodes(request)]
        if len(decoding) < len(self.running):
            return False
        return len(self.drafting.select(decoding, alone=True).held) == len(decoding)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """The workers' drafts, of which there are none."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        outcomes = self._outcomes(scheduler_output, model_runner_output)
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)
        self.drafting.record(outcomes, getattr(model_runner_output, STATES, None))
        self.drafting.finish(each.request_id for each in outcomes if each.request_id not in self.requests)
        self.drafting.observe_step(outcomes, time.monotonic() - self._began_s)
        self.drafting.send()
        return outputs

    def shutdown(self) -> None:
        self.drafting.close()
        super().shutdown()

    # -------------------------------------------------------------- inside

    def _outcomes(self, scheduled: SchedulerOutput, computed: ModelRunnerOutput) -> list[Outcome]:
        """The step's outcomes in the order of its rows, before vLLM cuts tokens off behind a stop."""
        outcomes = []
        for request_id in computed.req_ids:
            num_rows = scheduled.num_scheduled_tokens[request_id]
            request = self.requests.get(request_id)  # None: aborted meanwhile; its rows are passed over
            sampled = computed.sampled_token_ids[computed.req_id_to_index[request_id]]
            outcome = Outcome(
                request_id=request_id,
                start_position=0 if request is None else request.num_computed_tokens - num_rows,
                num_rows=num_rows,
                num_draft_tokens=len(scheduled.scheduled_spec_decode_tokens.get(request_id, ())),
                token_ids=tuple(sampled),
                block_hashes=() if request is None else request.block_hashes,
            )
            outcomes.append(outcome)
        return outcomes


def _decodes(request: Request) -> bool:
    """Whether all but the last token has been run."""
    return bool(request.num_tokens - request.num_computed_tokens == 1 and request.num_output_tokens)
