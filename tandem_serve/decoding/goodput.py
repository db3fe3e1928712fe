"""Block lengths from what was measured: as many drafts a round as make the most tokens a second, down to none.

With B sequences in a step, g drafts each, A(g) of them accepted on average, a step time t(n) for n tokens, and a wait
d(g) for drafts, a round yields

    tokens a second = B * (1 + A(g)) / (t(B * (1 + g)) + d(g)),        d(0) = 0

(after SmartSpec, arXiv 2406.14066). More tokens are nearly free until the hardware turns compute-bound, near 10 on a
CPU core and near 200 on a large GPU; from there on a long block costs more than it brings. No I/O, no clock: the
engine tells.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from tandem_serve.decoding.block_policy import BlockPlan
from tandem_serve.types import GenerationRequest, PolicyName, StoppingRule

NUM_SAMPLES = 9  # the latest ones of a size; their median counts, so that a hiccup of the machine does not
PROBE_ROUNDS = 64  # while nothing is drafted, one round in so many is, to see whether that still holds
PRIOR_ACCEPTANCE = 0.6
PRIOR_BLOCKS = 4.0  # how many blocks the prior is worth
DECAY = 0.995  # of what a block counts, with each later block
MAX_BLOCK_LENGTH = 16  # whatever a request asks for
MIN_WAIT_S = 0.01  # below that, hiccups of threads and networks decide
GAIN = 1.03  # drafting has to promise so much more than none: the model leaves out what drafts cost elsewhere


@dataclass(slots=True)
class Curve:
    """A cost in seconds by size, from samples. Hopeful about sizes that have none: a size that looks better than it is
    gets tried, measured, and left again.

    Such a size costs what the next smaller one does, or its share of the next larger one's cost where that is more: a
    roofline is like that, flat at first and then in proportion.
    """

    memory: int  # a sample is forgotten after so many others
    _sizes: list[int] = field(default_factory=list)
    _samples: dict[int, deque[float]] = field(default_factory=dict)
    _latest: dict[int, int] = field(default_factory=dict)  # when a size was last measured, in samples
    _count: int = 0

    def observe(self, size: int, seconds: float) -> None:
        self._count += 1
        if size not in self._samples:
            insort(self._sizes, size)
            self._samples[size] = deque(maxlen=NUM_SAMPLES)
        self._samples[size].append(seconds)
        self._latest[size] = self._count
        for old in [each for each in self._sizes if self._count - self._latest[each] > self.memory]:
            self._sizes.remove(old)
            del self._samples[old], self._latest[old]

    def __call__(self, size: int) -> float | None:
        """None before the first sample."""
        if not self._sizes:
            return None
        index = bisect_left(self._sizes, size)
        if index == len(self._sizes):
            return self._at(index - 1)
        upper = self._at(index)
        if self._sizes[index] == size:
            return upper
        in_proportion = upper * size / self._sizes[index]
        return in_proportion if index == 0 else max(in_proportion, self._at(index - 1))

    def _at(self, index: int) -> float:
        return median(self._samples[self._sizes[index]])


class Acceptance:
    """How often drafts are right by their place in the block, where those before were. Recent blocks count more."""

    def __init__(self) -> None:
        self._tried: list[float] = []
        self._right: list[float] = []

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        for counts in (self._tried, self._right):
            counts[:] = [count * DECAY for count in counts] + [0.0] * (num_draft_tokens - len(counts))
        for place in range(min(num_accepted_tokens + 1, num_draft_tokens)):
            self._tried[place] += 1
            self._right[place] += place < num_accepted_tokens

    def expected(self, longest: int) -> Iterator[float]:
        """Drafts accepted of a block of 0, 1, .. longest."""
        rate, survival, accepted = PRIOR_ACCEPTANCE, 1.0, 0.0
        yield accepted
        for place in range(longest):
            tried = self._tried[place] if place < len(self._tried) else 0.0
            right = self._right[place] if place < len(self._right) else 0.0
            rate = (right + PRIOR_BLOCKS * rate) / (
                tried + PRIOR_BLOCKS
            )  # a place not tried yet is like the one before
            survival *= rate
            accepted += survival
            yield accepted


class MeasuredBlockLength:
    """A BlockPolicy that maximises the formula above, for requests that leave it to the engine.

    `default` until a step has been measured (0: never any), `longest` at most. It also says how long drafts are worth
    waiting for. One thread. Unless it `adapts`: always `default`, and for as long as it takes.
    """

    def __init__(self, default: int = 5, longest: int = 8, *, adapts: bool = True) -> None:
        self._adapts = adapts
        self._longest = longest
        self.set_default(default)
        self.acceptance = Acceptance()
        self.step_time = Curve(memory=5000)
        self.draft_wait = Curve(memory=30)
        self._num_idle_rounds = 0
        self._plans: dict[int, int] = {}  # by sequences in a step; forgotten with every measurement

    def set_default(self, default: int) -> None:
        """Drafts a round until a step has been measured; 0: none at any time."""
        self.default = default
        self.longest = max(self._longest, default)

    # -------------------------------------------------------------- what the engine tells

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step that ran num_tokens, all of decoding sequences, took so long."""
        self.step_time.observe(num_tokens, seconds)
        self._plans.clear()

    def observe_block(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.acceptance.observe(num_draft_tokens, num_accepted_tokens)
        self._plans.clear()

    def observe_wait(self, block_length: int, wait_s: float) -> None:
        """Drafts were waited for so long, whether they came or not."""
        self.draft_wait.observe(block_length, wait_s)
        self._plans.clear()

    # -------------------------------------------------------------- what the engine asks

    def plan(self, request: GenerationRequest, num_requests_running: int) -> BlockPlan:
        """See BlockPolicy. A request's own policy ends blocks early at the drafter's own thresholds."""
        length = self.block_length(request.block_length, num_requests_running)
        if request.policy is None or request.policy is PolicyName.FIXED or length == 0:
            return BlockPlan(length)
        return BlockPlan(length, StoppingRule(request.policy, request.threshold))

    def block_length(self, requested: int | None, num_requests_running: int) -> int:
        """Drafts a round, at most."""
        if requested is not None:
            return min(max(requested, 0), MAX_BLOCK_LENGTH)
        if self.default == 0 or not self._adapts:
            return self.default
        if num_requests_running not in self._plans:
            self._plans[num_requests_running] = self._best(num_requests_running)
        best = self._plans[num_requests_running]
        if best == 0:
            self._num_idle_rounds += 1
            if self._num_idle_rounds % PROBE_ROUNDS == 0:
                return 1
        return best

    def longest_wait_s(self, block_length: int, num_requests_running: int) -> float:
        """What drafts may cost in waiting: the time that the tokens they are expected to bring take without them."""
        step_s = self.step_time(num_requests_running)
        if step_s is None or not self._adapts:
            return float("inf")
        *_, accepted = self.acceptance.expected(block_length)
        return max(accepted * step_s, MIN_WAIT_S)

    def saved_s(self, num_tokens: int, later_tokens: int) -> float:
        """What one step of all these tokens saves against one now and one later. 0 as long as nothing is measured."""
        now_s, later_s = self.step_time(num_tokens), self.step_time(later_tokens)
        together_s = self.step_time(num_tokens + later_tokens)
        if now_s is None or later_s is None or together_s is None:
            return 0.0
        return max(now_s + later_s - together_s, 0.0)

    def _best(self, batch: int) -> int:
        plain_s = self.step_time(batch)
        if plain_s is None:
            return self.default
        best, best_rate = 0, GAIN / plain_s
        for length, accepted in enumerate(self.acceptance.expected(self.longest)):
            step_s = self.step_time(batch * (1 + length))
            if length and step_s is not None:
                rate = (1 + accepted) / (step_s + (self.draft_wait(length) or 0.0))
                if rate > best_rate:
                    best, best_rate = length, rate
        return best
