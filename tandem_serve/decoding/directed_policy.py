"""The BlockPolicy of an engine whose router decides: what requests leave open is as long as the router says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tandem_serve.decoding.block_costs import NUM_PROBES, PROBE_LENGTH, CostRecorder
from tandem_serve.decoding.block_policy import BlockPlan, Round, StepSize
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.types import BlockLengths, DraftingCosts, GenerationRequest, PolicyName

LOAD_ROUNDS = 16


@dataclass(slots=True)
class DirectedPolicy:
    """Implements LearningPolicy. Goes by `requested` until it is directed, and for requests that choose for themselves.

    What is not done is not measured: so now and then all sequences do the other thing, in the same round, for beside
    sequences that rest drafts are only waited for. The load is the mean of some rounds: while one request ends and
    another begins, a change costs more than it brings. A load of less than half or more than twice that is another one.
    """

    requested: RequestedPolicy
    lengths: BlockLengths | None = None  # see `direct`
    recorder: CostRecorder = field(default_factory=CostRecorder)
    _load: float = 0.0  # sequences running
    _round: int = 0  # of all sequences together
    _num_left: int = 0  # plans until the next one

    def set_default(self, default: int) -> None:
        """See RequestedPolicy."""
        self.requested.set_default(default)

    def direct(self, lengths: BlockLengths | None) -> DraftingCosts:
        """See interfaces.Directable. Any thread."""
        if lengths is not None:
            self.lengths = lengths if lengths.by_batch else None
        return replace(self.recorder.costs(), lengths=self.lengths)

    def plan(self, request: GenerationRequest, num_requests_running: int) -> BlockPlan:
        """See BlockPolicy."""
        lengths = self.lengths
        policy = request.policy or self.requested.policy
        if lengths is None or request.block_length is not None or policy is PolicyName.OPTIMAL:
            return self.requested.plan(request, num_requests_running)  # the last sees by itself whether drafts pay
        self._count(num_requests_running)
        length, turn = lengths.at(round(self._load))
        if turn and self._round % turn < NUM_PROBES:
            length = 0 if length else PROBE_LENGTH
        if length and policy is not PolicyName.FIXED:
            return self.requested.plan(request, num_requests_running)  # its stopping rule says how long
        return BlockPlan(min(length, self.requested.maximum))

    def _count(self, num_requests_running: int) -> None:
        """One more plan: a round has as many as sequences ran when it began."""
        self._num_left = min(self._num_left, num_requests_running)  # others have ended since
        if self._num_left <= 0:
            self._round, self._num_left = self._round + 1, num_requests_running
            is_alike = self._load / 2 <= num_requests_running <= 2 * self._load
            self._load += (num_requests_running - self._load) / (LOAD_ROUNDS if is_alike else 1)
        self._num_left -= 1

    def observe_step(self, size: StepSize, seconds: float) -> None:
        """See LearningPolicy."""
        self.recorder.observe_step(size, seconds)
        self.requested.observe_step(size, seconds)

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        """See LearningPolicy."""
        self.recorder.observe_round(outcome)
        self.requested.observe_round(request, outcome)
