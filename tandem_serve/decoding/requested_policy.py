"""The BlockPolicy of an engine: each request's own choice, and where it makes none, the engine's."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem_serve.decoding.block_policy import BlockPlan, Round, StepSize
from tandem_serve.decoding.optimal_stopping import OptimalStopping
from tandem_serve.types import GenerationRequest, PolicyName, StoppingRule


@dataclass(slots=True)
class RequestedPolicy:
    """Implements LearningPolicy. `default` and `policy` may be changed at any time, from any thread."""

    default: int = 5  # drafts a round of the fixed policy
    policy: PolicyName = PolicyName.FIXED
    maximum: int = 64  # caps what requests ask for: a round verifies maximum + 1 tokens a sequence at most
    longest: int = 16  # drafts a round of any other policy, at most
    optimal: OptimalStopping = field(default_factory=OptimalStopping)

    def __post_init__(self) -> None:
        if not 0 <= self.default <= self.maximum:
            raise ValueError(f"block length default {self.default} is not within 0..{self.maximum}")

    def set_default(self, default: int) -> None:
        """Drafts a round where a request of the fixed policy does not say. Any thread."""
        self.default = default

    def plan(self, request: GenerationRequest, num_requests_running: int) -> BlockPlan:
        """See BlockPolicy."""
        policy = request.policy or self.policy
        wanted = request.block_length
        if wanted is None:
            wanted = self.default if policy is PolicyName.FIXED else self.longest
        length = min(max(wanted, 0), self.maximum)
        if policy is PolicyName.FIXED or length == 0:
            return BlockPlan(length)
        if self._is_planned(request):
            return self.optimal.plan(request, length, num_requests_running)
        return BlockPlan(length, StoppingRule(policy, request.threshold))

    def _is_planned(self, request: GenerationRequest) -> bool:
        """Whether how long its blocks are follows from what they cost."""
        return (request.policy or self.policy) is PolicyName.OPTIMAL and request.threshold is None

    def observe_step(self, size: StepSize, seconds: float) -> None:
        """See LearningPolicy."""
        self.optimal.observe_step(size, seconds)

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        """See LearningPolicy."""
        if self._is_planned(request):
            self.optimal.observe_round(request, outcome)
