"""Both engines in threads of their own, asyncio streams in front: the same tokens, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.async_primary import AsyncPrimary
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.errors import InvalidRequest, Overloaded, RequestAborted, Unavailable
from tandem_serve.interfaces import Drafter, DrafterLink, LinkFactory, Primary
from tandem_serve.types import GenerationRequest, SamplingParams
from tests.engines import a_request, generate, make_drafter_engine, make_engine, tiny_primary


@contextmanager
def running(drafter: DrafterEngine) -> Iterator[DrafterEngine]:
    drafter.start()
    try:
        yield drafter
    finally:
        drafter.stop()


async def collect(primary: Primary, request: GenerationRequest) -> tuple[tuple[int, ...], int]:
    """Token ids and how many of them were accepted drafts."""
    steps = [step async for step in primary.generate(request)]
    return tuple(t for s in steps for t in s.token_ids), sum(s.num_accepted_tokens for s in steps)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what changes lives on another thread
            await asyncio.sleep(0.005)


def test_the_engines_implement_the_seams() -> None:
    """For mypy as much as for pytest."""
    drafter = make_drafter_engine()
    as_drafter: Drafter = drafter
    as_factory: LinkFactory = local_link_factory({"d": drafter})
    as_primary: Primary = AsyncPrimary(make_engine())
    as_link: DrafterLink = as_factory("d", tiny_primary()[1], lambda: None)
    assert as_link.info == as_drafter.info
    assert as_primary is not None


@pytest.mark.parametrize("kind", ["tandem", "plain"])
async def test_several_primaries_share_one_drafter(kind: str) -> None:
    requests = [
        a_request(f"r{i}", range(2, 12 + 3 * i), 40, SamplingParams(temperature=0.7 * (i % 2), seed=i))
        for i in range(8)
    ]
    plain = {name: output.token_ids for name, output in generate(make_engine(), requests).items()}
    # Nobody is late for 30 s: acceptance does not depend on how busy the machine is.
    config = PrimaryEngineConfig(max_num_seqs=3, draft_timeout_s=30.0)
    with running(make_drafter_engine(kind)) as drafter:
        engines = [make_engine(config, link_factory=local_link_factory({"d": drafter})) for _ in range(3)]
        async with AsyncPrimary(engines[0]) as one, AsyncPrimary(engines[1]) as two, AsyncPrimary(engines[2]) as three:
            for primary in (one, two, three):
                primary.set_drafters(["d"])
            found = await asyncio.gather(*(collect(p, r) for r in requests for p in (one, two, three)))
    for index, (token_ids, num_accepted) in enumerate(found):
        assert token_ids == plain[requests[index // 3].request_id]
        assert num_accepted > 5
    assert not [thread.name for thread in threading.enumerate() if thread.name.endswith("-engine")]


async def test_closing_a_stream_aborts_in_both_pools() -> None:
    with running(make_drafter_engine()) as drafter:
        engine = make_engine(link_factory=local_link_factory({"d": drafter}))
        async with AsyncPrimary(engine) as primary:
            primary.set_drafters(["d"])
            stream = primary.generate(a_request(max_tokens=400))
            async for _ in stream:
                break
            await until(lambda: drafter.metrics.registry.get_sample_value("tandem:drafter_num_sequences") == 1)
            await stream.aclose()
            await until(lambda: engine.status().num_requests_running == 0)
            await until(lambda: drafter.metrics.registry.get_sample_value("tandem:drafter_num_sequences") == 0)
            assert (await primary.status()).kv_cache_usage == 0.0


async def test_a_cancelled_reader_aborts_its_request() -> None:
    engine = make_engine()
    async with AsyncPrimary(engine) as primary:
        reader = asyncio.create_task(collect(primary, a_request(max_tokens=400)))
        await until(lambda: engine.status().num_requests_running == 1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await until(lambda: engine.status().num_requests_running == 0)


async def test_refusals_are_raised_from_the_first_step() -> None:
    async with AsyncPrimary(make_engine(PrimaryEngineConfig(max_num_seqs=1, max_num_waiting=0))) as primary:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await anext(primary.generate(a_request(max_tokens=0)))
        first = primary.generate(a_request("a", max_tokens=400))
        await anext(first)
        with pytest.raises(Overloaded):
            await anext(primary.generate(a_request("b")))
        await first.aclose()


async def test_an_engine_that_is_not_running_is_unavailable() -> None:
    primary = AsyncPrimary(make_engine())
    with pytest.raises(Unavailable):
        await anext(primary.generate(a_request()))
    primary.start()
    await primary.close()
    with pytest.raises(Unavailable):
        await anext(primary.generate(a_request()))


async def test_close_drains_or_aborts() -> None:
    request = a_request(max_tokens=60)
    plain = generate(make_engine(), [request])["r"].token_ids
    engine = make_engine()
    patient, hasty = AsyncPrimary(engine), AsyncPrimary(make_engine())
    patient.start()
    hasty.start()
    whole = asyncio.create_task(collect(patient, request))
    cut = hasty.generate(replace(request, max_tokens=500))
    await anext(cut)
    await until(lambda: engine.has_work or whole.done())
    await asyncio.gather(patient.close(drain_timeout_s=30), hasty.close())
    assert (await whole)[0] == plain
    with pytest.raises(RequestAborted):
        async for _ in cut:
            pass


async def test_an_error_outside_a_batch_fails_the_requests_and_the_thread_lives_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()

    def broken(_: float) -> None:
        raise RuntimeError("a bug outside a batch")

    async with AsyncPrimary(engine) as primary:
        with monkeypatch.context() as patch:
            patch.setattr(engine.metrics.running, "set", broken)
            with pytest.raises(Unavailable):
                await collect(primary, a_request(max_tokens=400))
        assert len((await collect(primary, a_request("next")))[0]) == 12
