"""Optimal stopping: draft on while one more draft is expected to bring more tokens than its time is worth.

A block's survival S is the chance that all its drafts so far are right. One more draft brings S * p tokens, p being the
share of drafts that are accepted where they are reached. All B sequences of a batch wait for it and would each have
written `rate` tokens a second meanwhile: verifying a draft takes v seconds and costs rate * B * v tokens, making one m
and a step of the drafter s seconds besides, the latter whether it drafts for one block or for all. So a block gets
another draft while S * p >= rate * B * (m + v), all of them a further step while what they gain by it is rate * B * s,
and the draft that ends a block is verified while S >= rate * B * v. (Sequences under other policies count in B, but not
among those that gain by a step and pay for it.) Acceptance and times are measured as decoding goes; where the primary
alone is faster, there are no drafts but a few now and then, to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from tandem_serve.decoding.block_policy import BlockPlan, Round, StepSize
from tandem_serve.decoding.linear_cost import LinearCost
from tandem_serve.types import GenerationRequest, PolicyName, StoppingRule

MIN_TURNS = 8  # measured before costs are gone by, and twice as many before anything is concluded from them
FIRST_LENGTH = 4  # drafts until then, at most
# While drafts do not pay: of so many turns, so many draft all the same. The first rests are shorter, each twice the
# last: what a few rounds of one text have shown should not hold for long.
REST_TURNS, PROBE_TURNS, FIRST_REST = 64, 4, 8
# While drafts do pay, some turns go without, to see how fast the primary alone is: a few at first, then one in so many.
FIRST_LOOKS, LOOK_TURNS = 3, 256
_MAY_REST = 0.9  # of the primary's own speed: below that drafts rest, and go on above it

# What has been measured fades by so much a turn. Slowly: the rate that a draft competes with is that of many texts. A
# rate of the last few rounds alone is high where drafts come easily, and would end blocks there that should go on.
_DECAY = 0.995

# Means over sequences of which there are about as many each time: how much more they cost is guessed, not fitted.
_mean = partial(LinearCost, 1, decay=_DECAY, ridge=1.0, largest_surprise=4.0)


@dataclass(slots=True)
class _Counts:
    rounds: float = 0.0
    accepted: float = 0.0
    rejected: float = 0.0  # rounds that ended with a wrong draft

    def fade(self, share: float, more: _Counts) -> None:
        """Keeps that share and adds more."""
        self.rounds = share * self.rounds + more.rounds
        self.accepted = share * self.accepted + more.accepted
        self.rejected = share * self.rejected + more.rejected


@dataclass(slots=True)
class _Class:
    """Rounds with drafts of requests that resemble each other."""

    duration: LinearCost = field(default_factory=_mean)  # of a round, over sequences
    present: _Counts = field(default_factory=_Counts)  # in this turn
    present_s: float = 0.0  # all its rounds
    past: _Counts = field(default_factory=_Counts)  # these fade
    num_turns: float = 0.0  # with rounds
    rests: bool = False  # the primary alone is faster
    rest_length: float = 0.0
    rest_until: float = 0.0  # a turn: PROBE_TURNS from then on draft
    decided_in: float = -1.0  # a turn
    rule: StoppingRule | None = None  # decided then; None: no drafts

    def add(self, outcome: Round) -> None:
        self.present.rounds += 1
        self.present.accepted += outcome.num_accepted
        self.present.rejected += outcome.num_accepted < outcome.num_drafts
        self.present_s += outcome.seconds

    def end_turn(self, size: StepSize, share: float) -> None:
        """Of a step that was that share of a turn."""
        if not self.present.rounds:
            return
        self.num_turns += share
        if not size.has_prompts:
            self.duration.add((size.num_sequences,), self.present_s / self.present.rounds)
        self.past.fade(_DECAY, self.present)
        self.present, self.present_s = _Counts(), 0.0

    def rate(self, num_sequences: int) -> float:
        """Tokens a second of one sequence among so many; 0 where not known."""
        seconds = self.duration.at((num_sequences,))
        return (1 + self.past.accepted / self.past.rounds) / seconds if seconds else 0.0

    def judge(self, gain: float, turn: float) -> None:
        """`gain`: its rate over the primary's alone."""
        rested = self.rests
        self.rests = gain < (1.0 if rested else _MAY_REST)
        if self.rests and not rested:
            self.rest_length, self.rest_until = FIRST_REST, turn + FIRST_REST
        elif self.rests and turn >= self.rest_until + PROBE_TURNS:  # the last probe has changed nothing
            self.rest_length = min(2 * self.rest_length, REST_TURNS - PROBE_TURNS)
            self.rest_until = turn + self.rest_length
            self.past.fade(0.5, _Counts())  # of what little is measured from now on, more is to be believed
            self.duration.fade(0.5)


@dataclass(slots=True)
class _Load:
    """What is known of batches of about one size.

    Greedy and sampled requests are classes of their own: drafts are right more often in one than in the other. All look
    in the same turns, and all of a class rest in the same: beside sequences that rest, drafts are only waited for.
    """

    # A step, over sequences and drafts; a wait for drafts, over sequences, steps of the drafter and drafts. Sequences,
    # for with fewer of them there are fewer drafts as well, which would be taken for what made the difference. Drafts
    # are those that came: a last one that was dropped was made, too.
    verifying: LinearCost = field(default_factory=partial(LinearCost, 2, decay=_DECAY))
    drafting: LinearCost = field(default_factory=partial(LinearCost, 3, decay=_DECAY))
    overhead: LinearCost = field(default_factory=_mean)  # what a round takes besides those two
    # A step without drafts: a second row of a sequence takes longer than a third, so that line does not tell. There are
    # few of them while drafts pay, and each weighs much.
    alone: LinearCost = field(default_factory=partial(LinearCost, 1, decay=0.8, ridge=1.0))
    turn: float = 0.0  # rounds of all sequences together: what is planned between two steps is of one turn
    num_running: int = 1  # as the last plan was told
    draft_s: float = 0.0  # the longest wait for drafts that the present step verifies
    overhead_s: float = 0.0  # and what that round took besides, the step included
    classes: dict[bool, _Class] = field(default_factory=dict)

    def of(self, request: GenerationRequest) -> _Class:
        return self.classes.setdefault(request.sampling.temperature > 0, _Class())

    def plan(self, request: GenerationRequest, longest: int, num_running: int) -> BlockPlan:
        self.num_running = num_running
        kind = self.of(request)
        if kind.num_turns < MIN_TURNS:
            return BlockPlan(min(longest, FIRST_LENGTH), StoppingRule(PolicyName.OPTIMAL))
        if kind.decided_in != self.turn:
            kind.decided_in, kind.rule = self.turn, self._decide(kind)
        return BlockPlan(0 if kind.rule is None else longest, kind.rule)

    @property
    def _looks(self) -> bool:
        """Whether this turn goes without drafts. Others' drafts may be in its step all the same: then it told nothing,
        and the next look is as far off as ever."""
        since = self.turn - 2 * MIN_TURNS
        return since >= 0 and since % LOOK_TURNS < (FIRST_LOOKS if since < LOOK_TURNS else 1)

    def _decide(self, kind: _Class) -> StoppingRule | None:
        """How blocks of a class end in this turn; None: it goes without drafts."""
        if self._looks:
            return None
        rate = kind.rate(self.num_running)
        if not rate:  # every step so far had prompts
            return StoppingRule(PolicyName.OPTIMAL)
        if self.alone.is_known and kind.num_turns >= 2 * MIN_TURNS:
            sizes = (self.num_running,)
            kind.judge(rate * (self.alone.at(sizes) + self.overhead.at(sizes)), self.turn)
            if kind.rests and self.turn < kind.rest_until:
                return None
        return self._rule(rate, _acceptance(kind))

    def _rule(self, rate: float, acceptance: float) -> StoppingRule:
        """See the module."""
        _, step_s, making_s = self.drafting.slopes
        _, verifying_s = self.verifying.slopes
        waiting = rate * self.num_running  # tokens that all would have written, a second
        threshold = waiting * (making_s + verifying_s) / acceptance
        step_cost = rate * step_s / _acceptance(*self.classes.values())  # added to others', of either class
        if self.num_running == 1:  # nobody shares the step
            threshold, step_cost = threshold + step_cost, 0.0
        shares = threshold, waiting * verifying_s, step_cost
        return StoppingRule(PolicyName.OPTIMAL, *(min(share, 1.0) for share in shares))

    def add_round(self, request: GenerationRequest, outcome: Round) -> None:
        self.of(request).add(outcome)
        if outcome.draft_s >= self.draft_s:
            self.draft_s, self.overhead_s = outcome.draft_s, outcome.seconds - outcome.draft_s

    def add_step(self, size: StepSize, seconds: float) -> None:
        share = min(size.num_sequences / self.num_running, 1.0)
        self.turn += share
        for kind in self.classes.values():
            kind.end_turn(size, share)
        draft_s, overhead_s = self.draft_s, self.overhead_s
        self.draft_s = self.overhead_s = 0.0
        num_drafts = size.num_tokens - size.num_sequences
        if size.has_prompts:
            return
        if num_drafts:
            self.verifying.add((size.num_sequences, num_drafts), seconds)
            if draft_s:
                self.drafting.add((size.num_sequences, size.num_draft_steps, num_drafts), draft_s)
                self.overhead.add((size.num_sequences,), max(overhead_s - seconds, 0.0))
        elif self.verifying.is_known:  # no step without drafts takes longer than those with: a pause would, for long
            self.alone.add((size.num_sequences,), min(seconds, self.verifying.mean))


def _acceptance(*kinds: _Class) -> float:
    """Share of drafts accepted among those that follow accepted ones."""
    accepted = sum(kind.past.accepted for kind in kinds)
    reached = accepted + sum(kind.past.rejected for kind in kinds)
    return max(accepted / reached, 0.05) if reached else 1.0


@dataclass(slots=True)
class OptimalStopping:
    """Plans rounds of the `optimal` policy from what its owner, an engine's thread, has observed.

    Batches of 1, 2, up to 4, up to 8 and so on are learnt apart: the more rows a step has, the less another one costs.
    """

    _loads: dict[int, _Load] = field(default_factory=dict)
    _load: _Load | None = None  # of the last plan
    _has_planned: bool = False  # since the last step: else it ran others' requests alone

    def plan(self, request: GenerationRequest, longest: int, num_requests_running: int) -> BlockPlan:
        """The next round of a request: `longest` drafts at most."""
        doublings = (num_requests_running - 1).bit_length()
        self._load = self._loads.setdefault(doublings, _Load())
        self._has_planned = True
        return self._load.plan(request, longest, num_requests_running)

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        """See LearningPolicy. Of rounds that drafted: one whose block came empty is one, too."""
        if self._load is not None:
            self._load.add_round(request, outcome)

    def observe_step(self, size: StepSize, seconds: float) -> None:
        """See LearningPolicy."""
        if self._load is not None and self._has_planned:
            self._load.add_step(size, seconds)
        self._has_planned = False
