"""The router's say in block lengths, over primaries that only measure."""

from __future__ import annotations

import asyncio

from tandem_serve.config import PrimaryEngineConfig, SpeculationConfig
from tandem_serve.decoding.block_policy import Round
from tandem_serve.decoding.directed_policy import DirectedPolicy
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.errors import Unavailable
from tandem_serve.serving.block_lengths import BlockLengthControl
from tandem_serve.serving.completion import TextCompletion
from tandem_serve.types import BlockLengths, DraftingCosts, GenerationRequest, PolicyName, SamplingParams, TextRequest
from tests.checkpoints import make_tokenizer
from tests.engines import step_of
from tests.unit.scripted_primary import ScriptedPrimary

REQUEST = GenerationRequest("r", (1,), SamplingParams(), 8)


class Measuring(ScriptedPrimary):
    """A primary whose drafts take draft_s and are all right."""

    def __init__(self, draft_s: float, error: Exception | None = None) -> None:
        super().__init__()
        self.policy = DirectedPolicy(RequestedPolicy(PrimaryEngineConfig().block_length))
        self.error_when_directed = error
        self.told: list[BlockLengths] = []
        self.measure(draft_s)

    def measure(self, draft_s: float, rounds: int = 300) -> None:
        for _ in range(rounds):
            self.policy.observe_step(step_of(0), 0.01)
            self.policy.observe_step(step_of(4), 0.01)
            self.policy.observe_round(REQUEST, Round(4, 4, step_of(4), draft_s, draft_s + 0.01))

    async def direct(self, lengths: BlockLengths | None) -> DraftingCosts | None:
        if self.error_when_directed is not None:
            raise self.error_when_directed
        if lengths is not None:
            self.told.append(lengths)
        return self.policy.direct(lengths)


async def lengths_after(control: BlockLengthControl, primary: Measuring) -> int | None:
    """Drafts a round that one sequence gets."""
    await control.decide()
    return primary.policy.lengths.at(1)[0] if primary.policy.lengths is not None else None


async def test_the_router_follows_what_drafts_cost_down_to_none_and_back() -> None:
    primary = Measuring(draft_s=0.001)
    control = BlockLengthControl(lambda: [primary], lambda: SpeculationConfig(adapts=True))
    assert await lengths_after(control, primary) == 5  # one more than it has seen: step by step
    primary.measure(draft_s=1.0)
    assert await lengths_after(control, primary) == 0
    primary.measure(draft_s=0.001)
    assert (await lengths_after(control, primary) or 0) >= 4


async def test_all_primaries_get_what_is_decided_and_those_that_fail_or_decide_themselves_are_left_out() -> None:
    broken = Measuring(draft_s=9.0, error=Unavailable("gone"))
    first, second = Measuring(draft_s=0.001), Measuring(draft_s=0.001)
    control = BlockLengthControl(
        lambda: [broken, first, ScriptedPrimary(), second], lambda: SpeculationConfig(adapts=True)
    )
    await lengths_after(control, first)
    assert first.policy.lengths == second.policy.lengths is not None
    assert broken.policy.lengths is None


async def test_a_router_that_is_told_not_to_adapt_lets_the_primaries_go() -> None:
    primary = Measuring(draft_s=0.001)
    config = SpeculationConfig(adapts=True)
    control = BlockLengthControl(lambda: [primary], lambda: config)
    assert await lengths_after(control, primary) is not None
    config = SpeculationConfig(adapts=False)
    assert await lengths_after(control, primary) is None
    assert primary.policy.plan(REQUEST, 1).block_length == PrimaryEngineConfig().block_length


async def test_a_new_router_goes_on_from_what_the_primaries_go_by() -> None:
    primary, newcomer = Measuring(draft_s=0.001), Measuring(draft_s=0.001)
    first = BlockLengthControl(lambda: [primary], lambda: SpeculationConfig(adapts=True))
    assert await lengths_after(first, primary) == 5
    newcomer.policy = DirectedPolicy(RequestedPolicy(3))  # it has measured nothing
    second = BlockLengthControl(lambda: [newcomer], lambda: SpeculationConfig(adapts=True))
    assert await lengths_after(second, newcomer) is None, "nothing is known: nothing changes"
    forgetful = Measuring(draft_s=0.001)
    forgetful.policy = DirectedPolicy(RequestedPolicy(3), lengths=primary.policy.lengths)
    both = BlockLengthControl(lambda: [forgetful, newcomer], lambda: SpeculationConfig(adapts=True))
    assert await lengths_after(both, newcomer) == 5, "what another one goes by"
    assert forgetful.told == []
    num_told = len(primary.told)
    third = BlockLengthControl(lambda: [primary], lambda: SpeculationConfig(adapts=True))
    assert await lengths_after(third, primary) == 5
    assert len(primary.told) == num_told, "it goes by that already"


async def test_several_routers_do_not_contradict_each_other_near_a_crossing() -> None:
    # Five tokens a round in 0.01 s and what drafts take, against one in 0.01 s: drafts bring about 3 % more.
    for present in (0, 4):
        primary = Measuring(draft_s=0.0385)
        primary.policy.direct(BlockLengths((present,), (64,)))
        primaries, config = [primary], SpeculationConfig(adapts=True, longest_block_length=4)
        routers = [
            BlockLengthControl(lambda found=primaries: found, lambda found=config: found)  # type: ignore[misc]
            for _ in range(2)
        ]
        for turn in range(20):
            primary.measure(draft_s=0.0383 if turn % 2 else 0.0387, rounds=20)
            await routers[turn % 2].decide()
            assert primary.policy.lengths is not None
            assert primary.policy.lengths.at(1)[0] == present, "what it goes by is kept, whoever decides"
    primary.measure(draft_s=0.01)
    assert await lengths_after(routers[0], primary) == 4


async def test_an_error_costs_one_round() -> None:
    primary = Measuring(draft_s=0.001)
    calls = 0

    def primaries() -> list[Measuring]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("a bug")
        return [primary]

    control = BlockLengthControl(primaries, lambda: SpeculationConfig(adapts=True))
    running = asyncio.create_task(control.run())
    async with asyncio.timeout(20):
        while not primary.told:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()


async def test_requests_that_name_no_policy_get_the_routers() -> None:
    primary = ScriptedPrimary(range(20))
    config = SpeculationConfig(policy=PolicyName.ENTROPY, threshold=0.4)
    service = TextCompletion(
        primary,
        make_tokenizer(),
        model_name="demo",
        eos_token_ids=(),
        limits=lambda: None,  # type: ignore[arg-type, return-value]
        speculation=lambda: config,
    )
    ours = service._with_policy(TextRequest("r", "demo", "def"))
    assert (ours.policy, ours.threshold) == (PolicyName.ENTROPY, 0.4)
    theirs = TextRequest("r", "demo", "def", policy=PolicyName.FIXED)
    assert service._with_policy(theirs) is theirs
