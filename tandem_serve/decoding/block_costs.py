"""How long blocks should be at each load, from what rounds have cost. No I/O, no clock, no threads.

With B sequences in a step, g drafts each, A(g) of them accepted on average, a step time t(n) for n tokens, and a wait
d(g) for drafts, a round yields B * (1 + A(g)) tokens in t(B * (1 + g)) + d(g) seconds, d(0) being 0 (after SmartSpec,
arXiv 2406.14066). The primary measures (`CostRecorder`), the router decides for all primaries (`best_block_lengths`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tandem_serve.decoding.block_policy import Round, StepSize
from tandem_serve.types import BlockLengths, CostPoint, DraftingCosts

COST_DECAY = 0.98  # of what a sample weighs, with each later one of its size
ACCEPTANCE_DECAY = 0.995  # whether a draft is right says less than a time does
GAIN = 1.02  # another length has to promise so much more than the present one: near a crossing nothing flaps
DRAFTS_PAY = 1.03  # drafts have to bring so much more than none: they are another pool's work, and messages besides
MIN_WEIGHT = 4.0  # of all samples of a kind, before anything is concluded
PRIOR_ACCEPTANCE, PRIOR_DRAFTS = 0.6, 4.0  # of a place in the block that has not been tried, and what that weighs
PROBE_LENGTH, NUM_PROBES = 2, 2  # drafts of a probe where none are made else; rounds in a row that probe
PROBE_COST = 0.005  # what probes may cost, of all time; more in truth, drafters that rested have much to catch up on
_SHORTEST_TURN = 64  # rounds between probes, however cheap they are
_BINS_PER_DOUBLING = 6
_LARGEST_SURPRISE = 3.0  # a time counts for at most so many times the mean: a hiccup of the machine is no cost

# ------------------------------------------------------------------ measuring


def _bin(size: float) -> int:
    return round(_BINS_PER_DOUBLING * math.log2(max(size, 1)))


@dataclass(slots=True)
class _Mean:
    weight: float = 0.0
    size: float = 0.0
    seconds: float = 0.0

    def add(self, size: float, seconds: float, weight: float = 1.0) -> None:
        total = self.weight + weight
        self.size += (size - self.size) * weight / total
        self.seconds += (seconds - self.seconds) * weight / total
        self.weight = total


@dataclass(slots=True)
class CostRecorder:
    """Sums up a primary's rounds. On the engine's thread; `costs` may be read on any."""

    _verify: dict[int, _Mean] = field(default_factory=dict)
    _draft: dict[int, _Mean] = field(default_factory=dict)
    _tried: list[float] = field(default_factory=list)
    _right: list[float] = field(default_factory=list)

    def observe_step(self, size: StepSize, seconds: float) -> None:
        """A step has run. With prompts in it, its time says nothing of drafts."""
        if not size.has_prompts:
            _observe(self._verify, size.num_tokens, seconds)

    def observe_round(self, outcome: Round) -> None:
        """A round's drafts have been verified."""
        num_drafts = outcome.num_drafts
        if not num_drafts:
            return
        _observe(self._draft, max(outcome.step.num_draft_steps, num_drafts), outcome.draft_s)
        for counts in (self._tried, self._right):
            counts.extend([0.0] * (num_drafts - len(counts)))
        for place in range(min(outcome.num_accepted + 1, num_drafts)):
            self._tried[place] = ACCEPTANCE_DECAY * self._tried[place] + 1
            self._right[place] = ACCEPTANCE_DECAY * self._right[place] + (place < outcome.num_accepted)

    def costs(self) -> DraftingCosts:
        return DraftingCosts(_points(self._verify), _points(self._draft), tuple(self._tried), tuple(self._right))


def _observe(means: dict[int, _Mean], size: float, seconds: float) -> None:
    mean = means.setdefault(_bin(size), _Mean())
    if mean.weight >= MIN_WEIGHT:
        seconds = min(seconds, _LARGEST_SURPRISE * mean.seconds)
    mean.weight *= COST_DECAY
    mean.add(size, seconds)


def _points(means: dict[int, _Mean]) -> tuple[CostPoint, ...]:
    found = (mean for mean in means.copy().values() if mean.weight)  # else its first sample is just being added
    known = sorted(found, key=lambda mean: mean.size)
    return tuple(CostPoint(mean.size, mean.seconds, mean.weight) for mean in known)


# ------------------------------------------------------------------ deciding


def best_block_lengths(
    measured: Iterable[DraftingCosts], longest: int, max_batch: int, present: BlockLengths | None = None
) -> BlockLengths | None:
    """The lengths, up to `longest`, that yield the most tokens a second with 1 .. max_batch sequences.

    Args:
        measured: by primaries with the same models on the same hardware.
        present: what they go by now, which is kept where nothing promises GAIN.

    Returns:
        None where too little is known.
    """
    known = list(measured)
    verify, draft = _merged(c.verify for c in known), _merged(c.draft for c in known)
    if min(_weight(verify), _weight(draft)) < MIN_WEIGHT:
        return None
    step_s, wait_s = _curve(verify), _curve([CostPoint(0, 0.0, 0.0), *draft])  # hopeful about short blocks
    longest = min(longest, 1 + max(len(costs.tried) for costs in known))  # step by step: no drafter may make more
    accepted = list(_accepted(known, longest))

    def seconds(batch: int, length: int) -> float:
        return step_s(batch * (1 + length)) + (wait_s(length) if length else 0.0)

    def rate(batch: int, length: int) -> float:
        return (1 + accepted[length]) / seconds(batch, length)

    def worth(batch: int, length: int) -> float:
        return rate(batch, length) / (DRAFTS_PAY if length else 1)

    def best(batch: int) -> int:
        found = max(range(longest + 1), key=lambda length: worth(batch, length))
        now = min(present.at(batch)[0], longest) if present is not None else 0
        return found if worth(batch, found) >= GAIN * worth(batch, now) else now

    def turn(batch: int, length: int) -> int:
        probed = 0 if length else min(PROBE_LENGTH, longest)
        lost_s = seconds(batch, probed) - (1 + accepted[probed]) / rate(batch, length)
        return max(math.ceil(NUM_PROBES * lost_s / (PROBE_COST * seconds(batch, length))), _SHORTEST_TURN)

    batches = range(1, max_batch + 1)
    lengths = tuple(best(batch) for batch in batches)
    return BlockLengths(lengths, tuple(turn(batch, length) for batch, length in zip(batches, lengths, strict=True)))


def _size(point: CostPoint) -> float:
    return point.size


def _weight(points: Sequence[CostPoint]) -> float:
    return sum(point.weight for point in points)


def _merged(curves: Iterable[Sequence[CostPoint]]) -> list[CostPoint]:
    means: dict[int, _Mean] = {}
    for points in curves:
        for point in points:
            means.setdefault(_bin(point.size), _Mean()).add(point.size, point.seconds, point.weight)
    return list(_points(means))


def _curve(points: Sequence[CostPoint]) -> Callable[[float], float]:
    """Between two points as low as can be, so that what looks good there is tried, measured, and perhaps left again: a
    roofline is flat at first and then in proportion. Below the first as low as that, above the last as steep as before:
    over the last doubling, for between neighbours most of a difference is noise.
    """
    last = points[-1]
    slope = last.seconds / last.size / 2  # of a single point nobody knows
    if len(points) > 1:
        before = max((each for each in points if each.size <= last.size / 2), key=_size, default=points[0])
        slope = (last.seconds - before.seconds) / (last.size - before.size)
        slope = min(max(slope, 0.0), last.seconds / last.size)

    def at(size: float) -> float:
        if size <= points[0].size:
            return points[0].seconds
        for low, high in itertools.pairwise(points):
            if size <= high.size:
                return max(low.seconds, high.seconds * size / high.size)
        return last.seconds + slope * (size - last.size)

    return at


def _accepted(measured: Sequence[DraftingCosts], longest: int) -> Iterator[float]:
    """Drafts accepted of a block of 0, 1, .. longest. A place that was not tried is like the one before."""
    rate, survival, accepted = PRIOR_ACCEPTANCE, 1.0, 0.0
    yield accepted
    for place in range(longest):
        tried = sum(costs.tried[place] for costs in measured if place < len(costs.tried))
        right = sum(costs.right[place] for costs in measured if place < len(costs.right))
        rate = (right + PRIOR_DRAFTS * rate) / (tried + PRIOR_DRAFTS)
        survival *= rate
        accepted += survival
        yield accepted
