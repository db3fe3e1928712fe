"""Optimal stopping: draft on while one more draft is expected to bring more tokens than its time is worth.

A block's survival S is the chance that all its drafts so far are right. One more draft brings S * p tokens, p being the
share of drafts that are accepted where they are reached, and takes c seconds, to make and to verify; meanwhile the
sequence would have written rate * c tokens. So a drafter goes on while S >= rate * c / p, and the draft that ends the
block is worth verifying while S >= rate * (what verifying it takes). Rate and times are measured as decoding goes;
where the primary alone is faster, there are no drafts but a few now and then, to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem_serve.decoding.block_policy import BlockPlan, Round
from tandem_serve.types import GenerationRequest, PolicyName, StoppingRule

MIN_ROUNDS = 8  # of all sequences together, measured before anything is concluded
FIRST_LENGTH = 4  # drafts until then, at most
# While drafts do not pay: of so many rounds, so many draft all the same. The first rests are shorter, each twice the
# last: what a few rounds of one text have shown should not hold for long.
REST_ROUNDS, PROBE_ROUNDS, FIRST_REST = 64, 4, 8
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

    @property
    def mean(self) -> float:
        """Seconds, over the sizes that there have been."""
        return self._y / self._weight if self._weight else 0.0

    def at(self, size: float) -> float:
        """Expected seconds."""
        if not self._weight:
            return 0.0
        return max((self._y + self.slope * (size * self._weight - self._x)) / self._weight, 0.0)


@dataclass(slots=True)
class _Class:
    """Rounds of requests that resemble each other, in sums that fade."""

    tokens: float = 0.0
    seconds: float = 0.0
    company: float = 0.0  # seconds times sequences in a step
    accepted: float = 0.0
    rejected: float = 0.0  # rounds that ended with a wrong draft
    turn: float = 0.0  # rounds planned, of all sequences together
    num_running: int = 1  # as the last plan was told
    num_rounds: int = 0
    knows_costs: bool = False
    rests: bool = False  # the primary alone is faster
    rest_length: float = 0.0
    rest_until: float = 0.0  # a turn: PROBE_ROUNDS from then on draft

    def doubt(self) -> None:
        """Most of what is known of the rate is forgotten: rounds so far knew no costs, those to come do."""
        self.tokens, self.seconds, self.company = self.tokens / 8, self.seconds / 8, self.company / 8
        self.knows_costs = True

    def add(self, num_drafts: int, num_accepted: int, seconds: float) -> None:
        decay = 0.99
        self.num_rounds += 1
        self.tokens = decay * self.tokens + num_accepted + 1
        self.seconds = decay * self.seconds + seconds
        self.company = decay * self.company + seconds * self.num_running
        self.accepted = decay * self.accepted + num_accepted
        self.rejected = decay * self.rejected + (num_accepted < num_drafts)

    def is_probe(self) -> bool:
        """Whether a class that rests drafts in this turn."""
        if self.turn >= self.rest_until + PROBE_ROUNDS:  # the last probe has changed nothing
            self.rest_length = min(2 * self.rest_length, REST_ROUNDS - PROBE_ROUNDS)
            self.rest_until = self.turn + self.rest_length
        return self.turn >= self.rest_until

    @property
    def rate(self) -> float:
        """Tokens a second of one sequence."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def batch(self) -> float:
        """Sequences in a step, when that rate was measured."""
        return self.company / max(self.seconds, 1e-9)

    @property
    def acceptance(self) -> float:
        """Share of drafts accepted among those that follow accepted ones."""
        return max(self.accepted / max(self.accepted + self.rejected, 1e-9), 0.05)


@dataclass(slots=True)
class OptimalStopping:
    """Plans rounds of the `optimal` policy from what its owner, an engine's thread, has observed.

    Greedy and sampled requests are classes of their own: drafts are right more often in one than in the other.
    """

    # Whole rounds, less what their tokens took to verify, over the drafts of the longest block in them. Drafting, timed
    # alone, misses a third of what it costs on a small machine: caches that it empties, threads that it wakes.
    drafting: LinearCost = field(default_factory=lambda: LinearCost(decay=0.995))
    verifying: LinearCost = field(default_factory=LinearCost)  # over all tokens of an engine step
    undrafted: LinearCost = field(default_factory=LinearCost)  # rounds less their drafts: steps, and all else
    _classes: dict[bool, _Class] = field(default_factory=dict)

    def plan(self, request: GenerationRequest, longest: int, num_requests_running: int) -> BlockPlan:
        """The next round of a request: `longest` drafts at most."""
        kind = self._class_of(request)
        kind.num_running = num_requests_running
        # Planned one by one, but all rest together: beside sequences that rest, drafts are only waited for.
        kind.turn += 1 / max(num_requests_running, 1)
        first = MIN_ROUNDS * num_requests_running
        if kind.num_rounds < first:
            return BlockPlan(min(longest, FIRST_LENGTH), StoppingRule(PolicyName.OPTIMAL))
        if not kind.knows_costs:
            kind.doubt()
        alone_s = self._alone_s(kind.batch)  # of as many as the rate is of: the last ones of a batch would rest else
        may_rest = alone_s > 0 and kind.num_rounds >= 2 * first
        rested = kind.rests
        kind.rests = may_rest and kind.rate * alone_s < (1.0 if rested else 0.9)
        if kind.rests and not rested:
            kind.rest_length, kind.rest_until = FIRST_REST, kind.turn + FIRST_REST
        if kind.rests and not kind.is_probe():
            return BlockPlan(0)
        checking = kind.rate * self.verifying.slope * num_requests_running
        drafting = kind.rate * self.drafting.slope
        threshold = (drafting + checking) / kind.acceptance
        return BlockPlan(longest, StoppingRule(PolicyName.OPTIMAL, min(threshold, 1.0), min(checking, 1.0)))

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """See LearningPolicy."""
        self.verifying.add(num_tokens, seconds)

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        """See LearningPolicy. Of rounds that drafted: one whose block came empty is one, too."""
        if not outcome.step.has_prompts:
            verifying_s = self.verifying.slope * outcome.step.num_tokens
            self.drafting.add(outcome.step.num_draft_steps, max(outcome.seconds - verifying_s, 0.0))
            self.undrafted.add(outcome.step.num_draft_steps, max(outcome.seconds - outcome.draft_s, 0.0))
        self._class_of(request).add(outcome.num_drafts, outcome.num_accepted, outcome.seconds)

    def _alone_s(self, num_requests_running: float) -> float:
        """A round without drafts: its step, and what a round takes beside step and drafts. 0: not known."""
        step_s = self.verifying.at(num_requests_running)
        return step_s and step_s + max(self.undrafted.mean - self.verifying.mean, 0.0)

    def _class_of(self, request: GenerationRequest) -> _Class:
        return self._classes.setdefault(request.sampling.temperature > 0, _Class())
