"""When an engine says that it is broken: so that it is replaced, and asked for nothing until then."""

from __future__ import annotations

import asyncio
from pathlib import Path
from queue import SimpleQueue

import pytest

from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.engine import async_primary, drafter
from tandem_serve.engine.async_primary import AsyncPrimary
from tandem_serve.errors import RequestAborted, Unavailable
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.serving.drafter import DrafterReplica
from tandem_serve.serving.pool_replicas import DrafterDeployment, PrimaryDeployment
from tandem_serve.serving.primary import PrimaryReplica
from tandem_serve.types import CreditGranted, DraftBlock, DraftEvent, GenerationRequest
from tests.checkpoints import make_drafter
from tests.drafter_peer import extend, opening
from tests.engines import a_request, make_drafter_engine, make_engine, tiny_drafter, tiny_primary


def fail(*_: object) -> None:
    raise RuntimeError("a kernel gave up")


async def num_tokens(primary: AsyncPrimary, request: GenerationRequest) -> int:
    async with asyncio.timeout(30):
        return sum([len(step.token_ids) async for step in primary.generate(request)])


async def test_a_primary_that_fails_in_every_step_is_unhealthy_until_one_goes_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with AsyncPrimary(make_engine()) as primary:
        with monkeypatch.context() as patch:
            patch.setattr(tiny_primary()[0], "logits", fail)
            for i in range(async_primary.MAX_FAILED_STEPS):
                assert primary.is_healthy
                with pytest.raises(Unavailable):
                    await num_tokens(primary, a_request(f"r{i}"))
        assert not primary.is_healthy
        with pytest.raises(Unavailable):
            await primary.status()
        with pytest.raises(Unavailable):
            await primary.info()
        assert await num_tokens(primary, a_request()) == 12
        assert primary.is_healthy
        assert (await primary.status()).num_requests_waiting == 0


async def test_an_error_while_requests_are_failed_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults, one on top of the other, each of them once; the request is carried on."""
    engine = make_engine()
    set_gauges, fail_all = engine._set_gauges, engine.fail_all

    def gauges() -> None:
        monkeypatch.setattr(engine, "_set_gauges", set_gauges)
        fail()

    def failing() -> None:
        monkeypatch.setattr(engine, "fail_all", fail_all)
        fail()

    monkeypatch.setattr(engine, "_set_gauges", gauges)
    monkeypatch.setattr(engine, "fail_all", failing)
    async with AsyncPrimary(engine) as primary:
        assert await num_tokens(primary, a_request()) == 12
        assert engine.fail_all == fail_all


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_primary_whose_thread_has_died_takes_no_requests_and_leaves_none_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    primary = AsyncPrimary(engine)
    primary.start()
    stream = primary.generate(a_request(max_tokens=400))
    await anext(stream)

    def die() -> bool:
        raise SystemExit

    monkeypatch.setattr(engine, "step", die)
    async with asyncio.timeout(30):
        with pytest.raises(RequestAborted):
            async for _ in stream:
                pass
        await asyncio.to_thread(primary._thread.join)  # type: ignore[union-attr]
        assert not primary.is_healthy
        with pytest.raises(Unavailable):
            await primary.status()
        with pytest.raises(Unavailable):
            await anext(primary.generate(a_request("next")))
    await primary.close()


def test_a_drafter_that_fails_in_every_step_is_unhealthy_until_one_goes_well(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_drafter_engine()
    assert not engine.is_healthy  # nobody runs it
    answers: SimpleQueue[DraftEvent] = SimpleQueue()

    def deliver(events: list[DraftEvent]) -> None:
        for event in events:
            if not isinstance(event, CreditGranted):
                answers.put(event)

    def ask(incarnation: int) -> DraftEvent:
        engine.submit("p", [opening(incarnation=incarnation), extend(incarnation=incarnation)])
        return answers.get(timeout=30)

    model, _ = tiny_drafter()
    assert isinstance(model, TandemDrafter)
    engine.connect("p", deliver)
    engine.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(model.decoder, "logits", fail)
            for i in range(drafter.MAX_FAILED_STEPS):
                assert engine.is_healthy
                assert not isinstance(ask(1 + i), DraftBlock)
        assert not engine.is_healthy
        for i in range(2):  # the second block comes after the end of the first one's step
            assert isinstance(ask(100 + i), DraftBlock)
        assert engine.is_healthy
    finally:
        engine.stop()


async def test_serve_is_told_when_a_primary_is_broken() -> None:
    replica = PrimaryReplica(str(tiny_primary()[2]), PrimaryEngineConfig())
    PrimaryDeployment.check_health(replica)  # type: ignore[arg-type]
    await replica.close(0.0)
    with pytest.raises(Unavailable):
        PrimaryDeployment.check_health(replica)  # type: ignore[arg-type]


def test_serve_is_told_when_a_drafter_is_broken(tmp_path: Path) -> None:
    path = make_drafter(tmp_path / "drafter", tiny_primary()[2], layer_map=None)
    replica = DrafterReplica(str(path), DrafterEngineConfig())
    DrafterDeployment.check_health(replica)  # type: ignore[arg-type]
    replica.close()
    with pytest.raises(Unavailable):
        DrafterDeployment.check_health(replica)  # type: ignore[arg-type]
