"""Block lengths by measured costs: never worse than the best fixed length, and no dip where drafts stop paying."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from tandem_serve.decoding.block_costs import NUM_PROBES, CostRecorder, best_block_lengths
from tandem_serve.decoding.block_policy import Round
from tandem_serve.decoding.directed_policy import DirectedPolicy
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.types import BlockLengths, GenerationRequest, PolicyName, SamplingParams, StoppingRule
from tests.engines import step_of

LONGEST, MAX_BATCH = 8, 64
REQUEST = GenerationRequest("r", (1,), SamplingParams(), 8)


@dataclass
class World:
    """An engine as its costs: step_s by tokens, draft_s by length and sequences, and how often a draft is right."""

    step_s: Callable[[int], float]
    draft_s: Callable[[int, int], float]
    acceptance: float
    noise: float = 0.2
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def rate(self, batch: int, length: int) -> float:
        """Tokens a second that a fixed length yields."""
        accepted = sum(self.acceptance**place for place in range(1, length + 1))
        return batch * (1 + accepted) / self.seconds(batch, length)

    def seconds(self, batch: int, length: int) -> float:
        return self.step_s(batch * (1 + length)) + (self.draft_s(length, batch) if length else 0.0)

    def best_rate(self, batch: int) -> float:
        return max(self.rate(batch, length) for length in range(LONGEST + 1))

    def run(self, policy: DirectedPolicy, batch: int, seconds: float) -> float:
        """Rounds of `batch` sequences for so long, the router deciding once a second. Tokens a second.

        The policy sees noisy times; what it achieves is counted in clean ones.
        """
        now, decided, tokens = 0.0, 0.0, 0
        while now < seconds:
            lengths = [policy.plan(REQUEST, batch).block_length for _ in range(batch)]
            longest = max(lengths)
            step_s = self.step_s(batch + sum(lengths))
            draft_s = self.draft_s(longest, batch) if longest else 0.0
            size = step_of(*lengths)
            policy.observe_step(size, step_s * self._noise())
            for length in lengths:
                accepted = next((n for n in range(length) if self.rng.random() >= self.acceptance), length)
                tokens += 1 + accepted
                if length:
                    policy.observe_round(
                        REQUEST, Round(length, accepted, size, draft_s * self._noise(), draft_s + step_s)
                    )
            now += step_s + draft_s
            if now - decided >= 1.0:
                decided = now
                policy.lengths = best_block_lengths([policy.direct(None)], LONGEST, MAX_BATCH, policy.lengths)
        return tokens / now

    def _noise(self) -> float:
        return self.rng.uniform(1, 1 + self.noise) * (5 if self.rng.random() < 0.01 else 1)


def cpu() -> World:
    """A core: bound by computing from 10 tokens on. The crossing is near 8 sequences."""
    return World(lambda n: 0.004 + 0.0008 * max(n, 5), lambda g, b: 0.0005 + g * (0.0004 + 0.0002 * b), 0.55)


def gpu() -> World:
    """Bound by memory up to 200 tokens."""
    return World(lambda n: 0.01 * max(1.0, n / 200), lambda g, b: 0.001 + g * 0.0006, 0.75)


def slow_drafter() -> World:
    """Drafts never pay."""
    return World(lambda n: 0.005 + 0.0001 * n, lambda g, b: 0.05 * g, 0.6)


def directed() -> DirectedPolicy:
    return DirectedPolicy(RequestedPolicy(default=5))


@pytest.mark.parametrize("world", [cpu(), gpu(), slow_drafter()], ids=["cpu", "gpu", "slow drafter"])
def test_no_load_up_or_down_falls_below_the_best_fixed_length(world: World) -> None:
    policy = directed()
    world.run(policy, 1, 10)
    loads = [1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64]
    for batch in [*loads, *reversed(loads)]:
        world.run(policy, batch, 5)  # finds out
        assert world.run(policy, batch, 20) >= 0.95 * world.best_rate(batch), f"dips at {batch} sequences"


def test_drafting_stops_where_it_hurts_and_comes_back() -> None:
    world, policy = cpu(), directed()
    lengths = []
    for batch in (1, 64, 1):
        world.run(policy, batch, 10)
        assert policy.lengths is not None
        lengths.append(policy.lengths.at(batch)[0])
    assert lengths[0] > 0
    assert lengths[1] == 0
    assert lengths[2] > 0


def test_near_a_crossing_lengths_do_not_flap() -> None:
    world, policy = cpu(), directed()
    batch = next(n for n in range(1, 64) if world.rate(n, 0) > world.rate(n, 1))  # the two differ by next to nothing
    lengths = []
    for _ in range(60):
        world.run(policy, batch, 2)
        lengths.append(policy.lengths.at(batch)[0] if policy.lengths is not None else None)
    assert sum(before != after for before, after in itertools.pairwise(lengths[10:])) <= 4


def test_nothing_is_concluded_from_little() -> None:
    recorder = CostRecorder()
    assert best_block_lengths([recorder.costs()], 4, 8) is None
    assert best_block_lengths([], 4, 8) is None
    recorder.observe_step(step_of(0), 0.1)
    recorder.observe_round(Round(2, 1, step_of(2), 0.1, 0.2))
    assert best_block_lengths([recorder.costs()], 4, 8) is None


def test_what_several_primaries_measured_counts_together() -> None:
    recorders = [CostRecorder(), CostRecorder()]
    for _ in range(8):
        recorders[0].observe_step(step_of(0), 0.01)
        recorders[0].observe_step(step_of(5), 0.01)
        recorders[1].observe_round(Round(5, 5, step_of(5), 0.001, 0.011))
    assert best_block_lengths([recorders[0].costs()], 8, 1) is None
    both = best_block_lengths([recorder.costs() for recorder in recorders], 8, 1)
    assert both is not None
    assert both.at(1)[0] >= 5


def test_requests_that_choose_are_left_alone_and_all_others_probe_in_the_same_rounds() -> None:
    policy = directed()
    policy.lengths = BlockLengths((3, 0), (50, 50))
    chosen = GenerationRequest("r", (1,), SamplingParams(), 8, block_length=7)
    assert policy.plan(chosen, 2).block_length == 7
    optimal = replace(REQUEST, policy=PolicyName.OPTIMAL)
    assert policy.plan(optimal, 2) == policy.requested.plan(optimal, 2)
    ruled = {policy.plan(replace(REQUEST, policy=PolicyName.ENTROPY), 1).stopping for _ in range(100)}
    assert ruled == {StoppingRule(PolicyName.ENTROPY), None}  # None: it probes plain rounds
    policy = replace(directed(), lengths=policy.lengths)
    rounds = [{policy.plan(REQUEST, 2).block_length for _ in range(2)} for _ in range(100)]
    assert sum(lengths != {0} for lengths in rounds) == 2 * NUM_PROBES
    assert all(len(lengths) == 1 for lengths in rounds)
    policy = replace(directed(), lengths=policy.lengths)
    assert sum(policy.plan(REQUEST, 1).block_length == 0 for _ in range(100)) == 2 * NUM_PROBES


def test_while_one_request_ends_and_another_begins_lengths_stay() -> None:
    policy = directed()
    policy.lengths = BlockLengths((5, 5, 5, 0), (0,) * 4)
    planned = [policy.plan(REQUEST, running).block_length for running in [4] * 80 + [3] * 6 + [4] * 80]
    assert set(planned) == {0}
    assert [policy.plan(REQUEST, 2).block_length for _ in range(60)][-1] == 5
    assert [policy.plan(REQUEST, running).block_length for running in (64, 1, 1)] == [0, 0, 5], "another load"
