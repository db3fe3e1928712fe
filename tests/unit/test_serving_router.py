"""Pairing and failover, over scripted primaries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from tandem_serve.config import PairingConfig
from tandem_serve.errors import InvalidRequest, Overloaded, RequestAborted, Unavailable
from tandem_serve.serving.pairing import Pairing, Pool
from tandem_serve.serving.router import PairingRouter
from tandem_serve.types import (
    DrafterLoad,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    PrimaryStatus,
    SamplingParams,
)
from tests.unit.scripted_primary import ScriptedPrimary

PROMPT = (7, 8, 9)


def request(max_tokens: int = 8) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, SamplingParams(seed=3), max_tokens)


async def tokens_of(router: PairingRouter, max_tokens: int = 8) -> tuple[list[int], GenerationStep]:
    steps = [step async for step in router.generate(request(max_tokens))]
    return [token_id for step in steps for token_id in step.token_ids], steps[-1]


def router_of(*primaries: ScriptedPrimary, drafters: tuple[str, ...] = (), timeout_s: float = 5.0) -> PairingRouter:
    router = PairingRouter(start_timeout_s=timeout_s, failover_timeout_s=timeout_s)
    router.set_primaries({f"p{index}": primary for index, primary in enumerate(primaries)})
    router.set_drafters(drafters)
    return router


def test_a_pool_picks_the_least_loaded_and_then_takes_turns() -> None:
    pool = Pool()
    assert pool.pick() is None
    pool.set_members(["a", "b", "c"])
    with pool.carrying("a"), pool.carrying("a"), pool.carrying("b"):
        assert pool.pick() == "c"
        assert pool.pick(exclude={"c"}) == "b"
    assert pool.pick() == "c"  # all idle: the one that has had no turn
    with pool.carrying("c"):
        pass
    assert pool.pick() == "b"


def test_a_newcomer_is_not_flooded_to_make_up_for_its_absence() -> None:
    pool = Pool()
    pool.set_members(["a"])
    for _ in range(5):
        with pool.carrying("a"):
            pass
    pool.set_members(["a", "b"])
    picks = []
    for _ in range(4):
        picks.append(pool.pick())
        with pool.carrying(picks[-1]):
            pass
    assert sorted(picks) == ["a", "a", "b", "b"]


def test_who_has_left_gets_nothing_new_but_its_sequences_still_count_when_it_comes_back() -> None:
    pool = Pool()
    pool.set_members(["a", "b"])
    with pool.carrying("a"):
        pool.set_members(["b"])
        assert pool.pick(exclude={"b"}) is None
        pool.set_members(["a", "b"])
        assert pool.num_running("a") == 1
        assert pool.pick() == "b"
    assert pool.num_running("a") == 0


def pairing_of(primaries: str, drafters: str, **config: int) -> Pairing:
    pairing = Pairing(lambda: PairingConfig(**config))
    pairing.primaries.set_members(primaries)
    pairing.drafters.set_members(drafters)
    return pairing


def picks(pool: Pool, pick: Callable[[], str | None], count: int) -> str:
    """Who gets so many sequences that all stay."""
    found = ""
    for _ in range(count):
        member = pick()
        assert member is not None
        pool.start(member)
        found += member
    return found


def test_a_drafter_on_the_primary_s_node_comes_first_until_it_is_busier() -> None:
    pairing = pairing_of("p", "xyz")
    pairing.set_nodes({"p": "here", "x": "there", "y": "here", "z": "there"})
    found = picks(pairing.drafters, lambda: pairing.pick_drafter("p"), 7)
    assert found[0] == "y"
    assert sorted(found) == list("xxyyyzz")


def test_the_measured_round_trip_outweighs_the_node_and_a_far_drafter_is_left_for_busy_times() -> None:
    pairing = pairing_of("pq", "xy")
    pairing.set_nodes({"p": "here", "x": "there", "y": "here"})
    pairing.set_loads({"p": [DrafterLoad("x", 0, 0.001), DrafterLoad("y", 0, 0.010)]}, pairing.counted())
    assert picks(pairing.drafters, lambda: pairing.pick_drafter("p"), 5) == "xxxyx"
    assert pairing.pick_drafter("q") == "y", "another primary has measured nothing"
    pairing.set_loads({"p": [DrafterLoad("x", 1, 0.00100), DrafterLoad("y", 0, 0.00115)]}, pairing.counted())
    assert pairing.pick_drafter("p") == "y", "that is no difference"


def test_the_load_of_a_drafter_is_what_primaries_say_and_what_has_come_since() -> None:
    pairing = pairing_of("pq", "xy")
    assert picks(pairing.drafters, lambda: pairing.pick_drafter("p"), 4) == "xyxy"
    # A primary has moved one of x's to y, and another router has paired two with x.
    first, second = [DrafterLoad("x", 1, None), DrafterLoad("y", 3, None)], [DrafterLoad("x", 2, None)]
    pairing.set_loads({"p": first, "q": second}, pairing.counted())
    assert picks(pairing.drafters, lambda: pairing.pick_drafter("p"), 1) in "xy"
    pairing.drafters.end("y")
    pairing.drafters.end("y")
    assert picks(pairing.drafters, lambda: pairing.pick_drafter("p"), 2) == "yy"
    pairing.set_loads({"p": [DrafterLoad("x", 0, None), DrafterLoad("y", 4, None)]}, pairing.counted())
    assert picks(pairing.drafters, lambda: pairing.pick_drafter("p"), 4) == "xxxx"


def test_no_prefix_is_worth_waiting_for_a_seat() -> None:
    pairing = Pairing(lambda: PairingConfig(prefix_tokens=2, prefix_slack=100), lambda: 3)
    pairing.primaries.set_members("ab")
    found = picks(pairing.primaries, lambda: pairing.pick_primary((1, 2)), 6)
    assert sorted(found) == list("aaabbb")


def test_prompts_that_begin_alike_go_to_one_primary_while_it_is_hardly_busier() -> None:
    pairing = pairing_of("abc", "", prefix_tokens=4, prefix_slack=2)
    system = (1, 2, 3, 4, 5, 6, 7, 8)
    first = pairing.pick_primary(system)
    assert first is not None
    for index in range(3):
        pairing.primaries.start(first)
        expected = index < 2
        assert (pairing.pick_primary((*system, 9, index)) == first) is expected
    pairing.primaries.end(first)
    assert pairing.pick_primary((9, 9, 9, 9, *system)) != first, "not at its beginning"
    assert pairing.pick_primary((1, 2, 3)) != first, "too short to matter"


def test_the_longest_known_beginning_counts_and_the_dead_know_nothing() -> None:
    pairing = pairing_of("ab", "", prefix_tokens=2, prefix_slack=1)
    longer, shorter = (1, 2, 3, 4), (1, 2, 5, 5)
    first = pairing.pick_primary(longer)
    assert first is not None
    pairing.primaries.start(first)
    pairing.primaries.start(first)
    second = pairing.pick_primary(shorter)  # first is too busy
    assert second not in (first, None)
    pairing.primaries.end(first)
    assert pairing.pick_primary((*longer, 6)) == first
    assert pairing.pick_primary((*shorter, 6)) == second
    assert pairing.pick_primary(longer, exclude={first}) == second
    pairing.primaries.set_members([second])
    assert pairing.pick_primary(longer) == second


def test_without_a_prefix_cache_only_the_load_counts() -> None:
    pairing = pairing_of("ab", "")
    prompt = tuple(range(200))
    assert sorted(picks(pairing.primaries, lambda: pairing.pick_primary(prompt), 4)) == list("aabb")


async def test_the_router_takes_the_round_trips_from_its_primaries() -> None:
    class Measuring(ScriptedPrimary):
        async def status(self) -> PrimaryStatus:
            return replace(await super().status(), loads=(DrafterLoad("d0:1", 0, 0.010), DrafterLoad("d1:1", 0, 0.001)))

    primary = Measuring(range(8))
    router = router_of(primary, drafters=("d0:1", "d1:1"))
    await router.measure()
    for _ in range(3):
        await tokens_of(router)
    assert [request.drafter_address for request in primary.requests] == ["d1:1"] * 3


async def test_sequences_spread_over_both_pools() -> None:
    gate = asyncio.Event()
    primaries = [ScriptedPrimary(range(8), gate=gate) for _ in range(2)]
    router = router_of(*primaries, drafters=("d0:1", "d1:1", "d2:1"))
    streams = [router.generate(request()) for _ in range(6)]
    for stream in streams:
        await anext(stream)
    assert [primary.num_running for primary in primaries] == [3, 3]
    overview = await router.overview()
    assert {d.address: d.num_sequences for d in overview.drafters if d.address != "drafter:1"} == {
        "d0:1": 2,
        "d1:1": 2,
        "d2:1": 2,
    }
    gate.set()
    for stream in streams:
        assert [step async for step in stream][-1].finish_reason is FinishReason.LENGTH
    assert all(p.num_sequences == 0 for p in (await router.overview()).primaries)


async def test_without_drafters_the_primary_is_left_to_choose() -> None:
    primary = ScriptedPrimary(range(8))
    await tokens_of(router_of(primary))
    assert primary.requests[0].drafter_address is None


async def test_a_sequence_that_has_text_waits_for_room_where_a_new_one_is_refused() -> None:
    class FullAtFirst(ScriptedPrimary):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
            if not self.requests:
                self.requests.append(request)
                raise Overloaded("full")
            async for step in super().generate(request):
                yield step

    said = list(range(20, 28))
    failing = ScriptedPrimary(said, error=Unavailable("gone"), error_after=3, prompt_length=3)
    assert (await tokens_of(router_of(failing, FullAtFirst(said, prompt_length=3))))[0] == said
    with pytest.raises(Overloaded):
        await tokens_of(router_of(FullAtFirst(said)))


@pytest.mark.parametrize("error_after", [0, 3, 6])
@pytest.mark.parametrize("error", [Unavailable("gone"), RequestAborted("closing")])
async def test_another_primary_goes_on_where_one_failed(error: Exception, error_after: int) -> None:
    said = list(range(20, 28))
    failing = ScriptedPrimary(said, error=error, error_after=error_after, prompt_length=3)
    healthy = ScriptedPrimary(said, prompt_length=3)
    token_ids, last = await tokens_of(router_of(failing, healthy))
    assert token_ids == said
    assert last.finish_reason is FinishReason.LENGTH
    resumed = healthy.requests[0]
    assert resumed.prompt_token_ids == (*PROMPT, *said[:error_after])
    assert resumed.max_tokens == 8 - error_after
    assert resumed.sampling == request().sampling
    assert resumed.request_id != "r"


async def test_a_sequence_that_a_primary_gives_up_is_taken_over() -> None:
    class Aborting(ScriptedPrimary):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
            yield GenerationStep(request.request_id, (20, 21))
            yield GenerationStep(request.request_id, (), finish_reason=FinishReason.ABORT)

    healthy = ScriptedPrimary(range(20, 28), prompt_length=3)
    token_ids, last = await tokens_of(router_of(Aborting(), healthy))
    assert token_ids == list(range(20, 28))
    assert last.finish_reason is FinishReason.LENGTH


async def test_a_sequence_waits_for_a_primary_to_come_back() -> None:
    failing = ScriptedPrimary(range(20, 28), error=Unavailable("gone"), error_after=3, prompt_length=3)
    router = router_of(failing)
    stream = router.generate(request())
    first = await anext(stream)
    router.set_primaries({})
    rest = asyncio.ensure_future(anext(stream))
    await asyncio.wait([rest], timeout=0.01)
    router.set_primaries({"p9": ScriptedPrimary(range(20, 28), prompt_length=3)})
    token_ids = [*first.token_ids, *(await rest).token_ids]
    async for step in stream:
        token_ids.extend(step.token_ids)
    assert token_ids == list(range(20, 28))


async def test_where_no_primary_comes_the_request_fails_in_time() -> None:
    failing = ScriptedPrimary(range(8), error=Unavailable("out of order"))
    with pytest.raises(Unavailable, match="out of order"):
        await tokens_of(router_of(failing, timeout_s=0.3))
    with pytest.raises(Unavailable, match="no primary is known"):
        await tokens_of(router_of(timeout_s=0.0))


async def test_a_full_primary_s_request_goes_to_another_one() -> None:
    full = ScriptedPrimary(range(8), error=Overloaded("queue full", retry_after_s=7))
    token_ids, _ = await tokens_of(router_of(full, ScriptedPrimary(range(8))))
    assert token_ids == list(range(8))
    with pytest.raises(Overloaded) as raised:
        await tokens_of(router_of(full, full))
    assert raised.value.retry_after_s == 7


async def test_the_caller_s_own_errors_are_not_retried() -> None:
    wrong = ScriptedPrimary(error=InvalidRequest("no", field="seed"))
    other = ScriptedPrimary(range(8))
    with pytest.raises(InvalidRequest):
        await tokens_of(router_of(wrong, other))
    assert not other.requests


async def test_closing_a_stream_closes_it_at_the_primary() -> None:
    primary = ScriptedPrimary(range(8), gate=asyncio.Event())
    router = router_of(primary, drafters=("d0:1",))
    async with aclosing(router.generate(request())) as stream:
        await anext(stream)
    assert primary.num_closed_early == 1
    overview = await router.overview()
    assert [p.num_sequences for p in overview.primaries] == [0]
    assert all(d.num_sequences == 0 for d in overview.drafters)
