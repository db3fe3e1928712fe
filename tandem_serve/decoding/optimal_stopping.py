"""Optimal stopping: draft on while one more draft is expected to bring more tokens than its time is worth.

A block's survival S is the chance that all its drafts so far are right. One more draft brings S * p tokens, p being the
share of drafts that are accepted where they are reached, and takes c seconds, to make and to verify; meanwhile the
sequence would have written rate * c tokens. So a drafter goes on while S >= rate * c / p, and the draft that ends the
block is worth verifying while S >= rate * (what verifying it takes). Rate and times are measured as decoding goes;
where the primary alone is faster, there are no drafts but a few now and then, to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem_serve.decoding.block_policy import BlockPlan
from tandem_serve.types import GenerationRequest, PolicyName, StoppingRule

MIN_ROUNDS = 8  # measured before anything is concluded
REST_ROUNDS, PROBE_ROUNDS = 64, 4  # while drafts do not pay: of so many rounds, so many draft all the same
_LARGEST_SURPRISE = 3.0  # a time is taken for at most so many times the expected: a pause of the machine is no cost


class LinearCost:
    """Seconds as a line over a size, fitted to what is measured; old measurements fade."""

    def __init__(self, decay: float = 0.98) -> None:
        self._decay = decay
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, size: float, seconds: float) -> None:
        expected = self.at(size)
        if self._weight > MIN_ROUNDS and expected > 1e-6:
            seconds = min(seconds, _LARGEST_SURPRISE * expected)
        d = self._decay
        self._weight = d * self._weight + 1
        self._x, self._y = d * self._x + size, d * self._y + seconds
        self._xx, self._xy = d * self._xx + size * size, d * self._xy + size * seconds

    @property
    def slope(self) -> float:
        """Seconds for each more; a share of the mean as long as all sizes have been alike."""
        if not self._weight:
            return 0.0
        spread = self._xx - self._x * self._x / self._weight
        if spread < 0.05 * self._weight:
            return self._y / max(self._x, 1.0) / 2
        return max((self._xy - self._x * self._y / self._weight) / spread, 0.0)

    def at(self, size: float) -> float:
        """Expected seconds."""
        if not self._weight:
            return 0.0
        return max((self._y + self.slope * (size * self._weight - self._x)) / self._weight, 0.0)


@dataclass(slots=True)
class _Class:
    """Rounds of requests that resemble each other, in sums that fade."""

    rounds: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    accepted: float = 0.0
    rejected: float = 0.0  # rounds that ended with a wrong draft
    num_planned: int = 0
    rests: bool = False  # the primary alone is faster

    def add(self, num_drafts: int, num_accepted: int, seconds: float) -> None:
        decay = 0.99
        self.rounds = decay * self.rounds + 1
        self.tokens = decay * self.tokens + num_accepted + 1
        self.seconds = decay * self.seconds + seconds
        self.accepted = decay * self.accepted + num_accepted
        self.rejected = decay * self.rejected + (num_accepted < num_drafts)

    @property
    def rate(self) -> float:
        """Tokens a second of one sequence."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def acceptance(self) -> float:
        """Share of drafts accepted among those that follow accepted ones."""
        return max(self.accepted / max(self.accepted + self.rejected, 1e-9), 0.05)


@dataclass(slots=True)
class OptimalStopping:
    """Plans rounds of the `optimal` policy from what its owner, an engine's thread, has observed.

    Greedy and sampled requests are classes of their own: drafts are right more often in one than in the other.
    """

    drafting: LinearCost = field(
        default_factory=LinearCost
    )  # over the drafts of a step's longest block; the round trip included
    verifying: LinearCost = field(default_factory=LinearCost)  # over all tokens of an engine step
    _classes: dict[bool, _Class] = field(default_factory=dict)

    def plan(self, request: GenerationRequest, longest: int, num_requests_running: int) -> BlockPlan:
        """The next round of a request: `longest` drafts at most."""
        kind = self._class_of(request)
        kind.num_planned += 1
        if kind.rounds < MIN_ROUNDS:
            return BlockPlan(longest, StoppingRule(PolicyName.OPTIMAL))
        alone_s = self.verifying.at(num_requests_running)  # a step without drafts; 0: not known
        kind.rests = kind.rate * alone_s < (1.0 if kind.rests else 0.9) * (alone_s > 0)
        # Planned one by one, but probed all together: beside sequences that rest, drafts are only waited for.
        if kind.rests and kind.num_planned // max(num_requests_running, 1) % REST_ROUNDS >= PROBE_ROUNDS:
            return BlockPlan(0)
        checking = kind.rate * self.verifying.slope * num_requests_running
        threshold = (kind.rate * self.drafting.slope + checking) / kind.acceptance
        return BlockPlan(longest, StoppingRule(PolicyName.OPTIMAL, min(threshold, 1.0), min(checking, 1.0)))

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """See LearningPolicy."""
        self.verifying.add(num_tokens, seconds)

    def observe_round(
        self,
        request: GenerationRequest,
        num_drafts: int,
        num_accepted: int,
        num_draft_steps: int,
        draft_s: float,
        round_s: float,
    ) -> None:
        """See LearningPolicy. A round whose block came empty is one, too."""
        self.drafting.add(num_draft_steps, draft_s)
        self._class_of(request).add(num_drafts, num_accepted, round_s)

    def _class_of(self, request: GenerationRequest) -> _Class:
        return self._classes.setdefault(request.sampling.temperature > 0, _Class())
