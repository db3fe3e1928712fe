"""Optimal stopping: draft on while one more draft is expected to bring more tokens than its time is worth.

A block's survival S is the chance that all its drafts so far are right. One more draft brings S * p tokens, p being the
share of drafts that are accepted where they are reached. All B sequences of a batch wait for it and would each have
written `rate` tokens a second meanwhile: verifying a draft takes v seconds and costs rate * B * v tokens, making one m
and a step of the drafter s seconds besides, the latter whether it drafts for one block or for all. So a block gets
another draft while S * p >= rate * B * (m + v), all of them a further step while what they gain by it is rate * B * s,
and the draft that ends a block is verified while S >= rate * B * v. Acceptance and times are measured as decoding goes;
where the primary alone is faster, there are no drafts but a few now and then, to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from tandem_serve.decoding.block_policy import BlockPlan, Round, StepSize
from tandem_serve.decoding.linear_cost import LinearCost
from tandem_serve.types import GenerationRequest, PolicyName, StoppingRule

MIN_TURNS = 8  # rounds of all sequences, measured before anything is concluded
FIRST_LENGTH = 4  # drafts until then, at most
# While drafts do not pay: of so many turns, so many draft all the same. The first rests are shorter, each twice the
# last: what a few rounds of one text have shown should not hold for long.
REST_TURNS, PROBE_TURNS, FIRST_REST = 64, 4, 8
LOOK_TURNS = 256  # while drafts do pay, one turn in so many goes without: to see how fast the primary alone is
_MAY_REST = 0.9  # of the primary's own speed: below that drafts rest, and go on above it

# What has been measured fades by so much a turn. Slowly: the rate that a draft competes with is that of many texts. A
# rate of the last few rounds alone is high where drafts come easily, and would end blocks there that should go on.
_DECAY = 0.995

_mean = partial(LinearCost, 0, decay=_DECAY)


@dataclass(slots=True)
class _Counts:
    rounds: float = 0.0
    accepted: float = 0.0
    rejected: float = 0.0  # rounds that ended with a wrong draft
    seconds: float = 0.0


@dataclass(slots=True)
class _Class:
    """Rounds with drafts of requests that resemble each other."""

    duration: LinearCost = field(default_factory=_mean)  # of a round
    present: _Counts = field(default_factory=_Counts)  # in this turn
    past: _Counts = field(default_factory=_Counts)  # these fade
    num_rounds: int = 0
    rests: bool = False  # the primary alone is faster
    rest_length: float = 0.0
    rest_until: float = 0.0  # a turn: PROBE_TURNS from then on draft
    decided_in: float = -1.0  # a turn
    rule: StoppingRule | None = None  # decided then; None: no drafts

    def add(self, outcome: Round) -> None:
        now = self.present
        now.rounds += 1
        now.accepted += outcome.num_accepted
        now.rejected += outcome.num_accepted < outcome.num_drafts
        now.seconds += outcome.seconds

    def end_turn(self, *, has_prompts: bool) -> None:
        now, past = self.present, self.past
        if not now.rounds:
            return
        self.num_rounds += round(now.rounds)
        past.rounds = _DECAY * past.rounds + now.rounds
        past.accepted = _DECAY * past.accepted + now.accepted
        past.rejected = _DECAY * past.rejected + now.rejected
        if not has_prompts:
            self.duration.add((), now.seconds / now.rounds)
        self.present = _Counts()

    @property
    def rate(self) -> float:
        """Tokens a second of one sequence; 0 where not known."""
        return (1 + self.past.accepted / self.past.rounds) / self.duration.mean if self.duration.mean else 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafts accepted among those that follow accepted ones."""
        return max(self.past.accepted / max(self.past.accepted + self.past.rejected, 1e-9), 0.05)

    def judge(self, gain: float, turn: float) -> None:
        """`gain`: its rate over the primary's alone."""
        rested = self.rests
        self.rests = gain < (1.0 if rested else _MAY_REST)
        if self.rests and not rested:
            self.rest_length, self.rest_until = FIRST_REST, turn + FIRST_REST
        elif self.rests and turn >= self.rest_until + PROBE_TURNS:  # the last probe has changed nothing
            self.rest_length = min(2 * self.rest_length, REST_TURNS - PROBE_TURNS)
            self.rest_until = turn + self.rest_length


@dataclass(slots=True)
class _Load:
    """What is known of batches of about one size.

    Greedy and sampled requests are classes of their own: drafts are right more often in one than in the other. Both
    look in the same turns, and so do all requests of a class rest: beside sequences that rest, drafts are only waited
    for.
    """

    # A step, over sequences and drafts; a wait for drafts, over sequences, steps of the drafter and drafts. Sequences,
    # for with fewer of them there are fewer drafts as well, which would be taken for what made the difference.
    verifying: LinearCost = field(default_factory=partial(LinearCost, 2, decay=_DECAY))
    drafting: LinearCost = field(default_factory=partial(LinearCost, 3, decay=_DECAY))
    beside: LinearCost = field(default_factory=_mean)  # what a round takes besides those two
    # A step without drafts: a second row of a sequence takes longer than a third, so that line does not tell. There are
    # few of them while drafts pay, and each weighs much.
    alone: LinearCost = field(default_factory=partial(LinearCost, 0, decay=0.8))
    turn: float = 0.0  # rounds of all sequences together: what is planned between two steps is of one turn
    num_running: int = 1  # as the last plan was told
    draft_s: float = 0.0  # the longest wait for drafts that the present step verifies
    beside_s: float = 0.0  # and what that round took besides, the step included
    classes: dict[bool, _Class] = field(default_factory=dict)

    def of(self, request: GenerationRequest) -> _Class:
        return self.classes.setdefault(request.sampling.temperature > 0, _Class())

    def plan(self, request: GenerationRequest, longest: int, num_running: int) -> BlockPlan:
        self.num_running = num_running
        kind = self.of(request)
        if kind.num_rounds < MIN_TURNS * num_running or not kind.rate:
            return BlockPlan(min(longest, FIRST_LENGTH), StoppingRule(PolicyName.OPTIMAL))
        if kind.decided_in != self.turn:
            kind.decided_in, kind.rule = self.turn, self._decide(kind)
        return BlockPlan(0 if kind.rule is None else longest, kind.rule)

    def _decide(self, kind: _Class) -> StoppingRule | None:
        """How blocks of a class end in this turn; None: it goes without drafts."""
        if kind.num_rounds >= 2 * MIN_TURNS * self.num_running:
            alone_s = self.alone.mean if self.alone.is_known else self.verifying.at((self.num_running, 0))
            kind.judge(kind.rate * (alone_s + self.beside.mean), self.turn)
            looks = self.turn % LOOK_TURNS < 1 or not self.alone.is_known
            if looks or (kind.rests and self.turn < kind.rest_until):
                return None
        _, step_s, making_s = self.drafting.slopes
        _, verifying_s = self.verifying.slopes
        waiting = kind.rate * self.num_running  # tokens that all would have written, a second
        threshold = waiting * (making_s + verifying_s) / kind.acceptance
        shares = threshold, waiting * verifying_s, kind.rate * step_s / kind.acceptance
        return StoppingRule(PolicyName.OPTIMAL, *(min(share, 1.0) for share in shares))

    def add_round(self, request: GenerationRequest, outcome: Round) -> None:
        self.of(request).add(outcome)
        if outcome.draft_s >= self.draft_s:
            self.draft_s, self.beside_s = outcome.draft_s, outcome.seconds - outcome.draft_s

    def add_step(self, size: StepSize, seconds: float) -> None:
        self.turn += size.num_sequences / max(self.num_running, 1)
        draft_s, beside_s = self.draft_s, self.beside_s
        self.draft_s = self.beside_s = 0.0
        for kind in self.classes.values():
            kind.end_turn(has_prompts=size.has_prompts)
        num_drafts = size.num_tokens - size.num_sequences
        if size.has_prompts:
            return
        if not num_drafts:
            self.alone.add((), seconds)
            return
        self.verifying.add((size.num_sequences, num_drafts), seconds)
        if draft_s:
            self.drafting.add((size.num_sequences, size.num_draft_steps, num_drafts), draft_s)
            self.beside.add((), max(beside_s - seconds, 0.0))


@dataclass(slots=True)
class OptimalStopping:
    """Plans rounds of the `optimal` policy from what its owner, an engine's thread, has observed.

    Batches of 1, 2, up to 4, up to 8 and so on are learnt apart: the more rows a step has, the less another one costs.
    """

    _loads: dict[int, _Load] = field(default_factory=dict)
    _load: _Load = field(default_factory=_Load)  # of the last plan

    def plan(self, request: GenerationRequest, longest: int, num_requests_running: int) -> BlockPlan:
        """The next round of a request: `longest` drafts at most."""
        doublings = (num_requests_running - 1).bit_length()
        self._load = self._loads.setdefault(doublings, _Load())
        return self._load.plan(request, longest, num_requests_running)

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        """See LearningPolicy. Of rounds that drafted: one whose block came empty is one, too."""
        self._load.add_round(request, outcome)

    def observe_step(self, size: StepSize, seconds: float) -> None:
        """See LearningPolicy."""
        self._load.add_step(size, seconds)
