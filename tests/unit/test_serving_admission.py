"""Overload: who runs, who waits, who is sent away; and requests whose time is up or whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest

from tandem_serve.config import AdmissionConfig
from tandem_serve.errors import DeadlineExceeded, Overloaded
from tandem_serve.serving.admission import Admission, AdmittedTextService
from tandem_serve.types import TextRequest
from tests.scripted_text import ScriptedText


def admission_of(num_primaries: Callable[[], int] = lambda: 1, **config: int) -> Admission:
    wanted = AdmissionConfig(**{"max_running_per_primary": 2, **config})  # type: ignore[arg-type]
    return Admission(lambda: wanted, num_primaries)


class Crowd:
    """Requests in the order in which they were let in."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.let_in: list[str] = []
        self.refused: dict[str, Overloaded] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def send(self, name: str, size: int = 1) -> None:
        """A request of the client that the name begins with."""

        async def wait() -> None:
            try:
                await self.admission.acquire(name[0], size)
                self.let_in.append(name)
            except Overloaded as error:
                self.refused[name] = error

        self.tasks[name] = asyncio.create_task(wait())
        await asyncio.sleep(0)  # it has begun

    async def end(self, name: str, size: int = 1) -> None:
        self.admission.release(name[0], size)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_a_client_with_one_request_does_not_wait_behind_another_s_many() -> None:
    crowd = Crowd(admission_of())
    for name in ("a1", "a2", "a3", "a4", "a5", "b1", "c1"):
        await crowd.send(name)
    assert crowd.let_in == ["a1", "a2"]
    for name in ("a1", "a2", "b1", "c1"):
        await crowd.end(name)
    assert crowd.let_in == ["a1", "a2", "b1", "a3", "c1", "a4"]


async def test_clients_that_both_send_much_share_by_turns() -> None:
    crowd = Crowd(admission_of(max_running_per_primary=1))
    for name in ("a0", "a1", "a2", "a3", "b1", "b2", "b3"):
        await crowd.send(name)
    for index in range(6):
        await crowd.end(crowd.let_in[index])
    assert crowd.let_in == ["a0", "a1", "b1", "a2", "b2", "a3", "b3"]


async def test_what_does_not_fit_the_queue_is_refused_at_once() -> None:
    crowd = Crowd(admission_of(max_queued=3, max_queued_per_client=2))
    for name in ("a1", "a2", "a3", "a4", "a5"):
        await crowd.send(name)
    assert set(crowd.refused) == {"a5"}  # its own share is full
    await crowd.send("b1")
    await crowd.send("b2")  # the queue is full, and nobody has more in it than b would
    assert set(crowd.refused) == {"a5", "b2"}
    assert crowd.admission.num_queued == 3


async def test_the_newest_of_whoever_has_most_makes_room() -> None:
    crowd = Crowd(admission_of(max_queued=3, max_queued_per_client=3))
    for name in ("a1", "a2", "a3", "a4", "a5", "b1"):
        await crowd.send(name)
    await crowd.tasks["a5"]
    assert set(crowd.refused) == {"a5"}
    assert crowd.admission.num_queued == 3


async def test_n_completions_count_n_and_more_than_there_is_room_for_run_alone() -> None:
    crowd = Crowd(admission_of())
    await crowd.send("a1", 2)
    await crowd.send("b1", 5)
    assert crowd.let_in == ["a1"]
    await crowd.end("a1", 2)
    await crowd.send("c1")
    assert crowd.let_in == ["a1", "b1"]
    await crowd.end("b1", 5)
    assert crowd.let_in == ["a1", "b1", "c1"]


async def test_more_primaries_let_more_in() -> None:
    primaries = 1
    crowd = Crowd(admission_of(lambda: primaries))
    for name in ("a1", "a2", "a3", "a4", "a5"):
        await crowd.send(name)
    primaries = 2
    await crowd.end("a1")
    assert crowd.let_in == ["a1", "a2", "a3", "a4", "a5"]


async def test_who_leaves_while_waiting_is_forgotten() -> None:
    crowd = Crowd(admission_of())
    for name in ("a1", "a2", "a3", "b1"):
        await crowd.send(name)
    crowd.tasks["b1"].cancel()
    await asyncio.sleep(0)
    assert crowd.admission.num_queued == 1
    await crowd.end("a1")
    assert crowd.let_in == ["a1", "a2", "a3"]
    assert crowd.admission.num_running == 2


async def test_who_leaves_in_the_moment_of_being_let_in_holds_nothing() -> None:
    crowd = Crowd(admission_of(max_running_per_primary=1))
    for name in ("a1", "b1", "c1"):
        await crowd.send(name)
    crowd.admission.release("a", 1)  # grants b1, which has not run since
    crowd.tasks["b1"].cancel()
    await asyncio.gather(crowd.tasks["b1"], return_exceptions=True)
    await asyncio.sleep(0)
    assert crowd.let_in == ["a1", "c1"]
    assert crowd.admission.num_running == 1


async def test_a_seat_that_becomes_free_in_the_moment_in_which_a_waiter_leaves_is_not_lost() -> None:
    crowd = Crowd(admission_of(max_running_per_primary=1))
    for name in ("a1", "b1", "c1"):
        await crowd.send(name)
    crowd.tasks["b1"].cancel()  # it learns that when it runs next
    crowd.admission.release("a", 1)
    await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert crowd.tasks["b1"].cancelled()
    assert crowd.let_in == ["a1", "c1"]
    assert (crowd.admission.num_running, crowd.admission.num_queued) == (1, 0)


async def test_who_leaves_in_the_moment_of_making_room_harms_nobody() -> None:
    crowd = Crowd(admission_of(max_queued=3, max_queued_per_client=3))
    for name in ("a1", "a2", "a3", "a4", "a5"):
        await crowd.send(name)
    crowd.tasks["a5"].cancel()
    await crowd.send("b1")
    await asyncio.gather(crowd.tasks["a5"], return_exceptions=True)
    assert crowd.tasks["a5"].cancelled()
    assert not crowd.refused
    assert crowd.admission.num_queued == 3


async def test_retry_after_follows_the_queue_and_the_pace() -> None:
    now = 0.0
    config = AdmissionConfig(max_running_per_primary=1, max_queued=20, max_queued_per_client=20)
    admission = Admission(lambda: config, lambda: 1, lambda: now)
    crowd = Crowd(admission)
    for index in range(41):
        await crowd.send(f"a{index}")
        if index >= 20:
            now += 2.0
            await crowd.end("a")
            await crowd.send("a more")
    await crowd.send("a last")
    assert 30 < crowd.refused["a last"].retry_after_s <= 40  # 20 that wait, 2 s each


# ------------------------------------------------------------------ requests


REQUEST = TextRequest("r", "", "a prompt", client="c")


async def test_a_request_whose_time_is_up_is_ended_where_it_runs() -> None:
    text = ScriptedText(gate=asyncio.Event())  # it never comes to its second delta
    admission = admission_of()
    service = AdmittedTextService(text, admission, timeout_s=0.02)
    with pytest.raises(DeadlineExceeded):
        async for _ in service.complete(REQUEST):
            pass
    assert (text.num_running, admission.num_running) == (0, 0)
    (seen,) = text.requests
    assert seen.timeout_s is not None  # what is behind it knows as well
    assert 0 < seen.timeout_s <= 0.02


async def test_a_request_whose_time_is_up_while_it_waits_is_never_begun() -> None:
    text = ScriptedText(gate=asyncio.Event())
    service = AdmittedTextService(text, admission_of(max_running_per_primary=1))
    async with aclosing(service.complete(REQUEST)) as running:
        await anext(running)
        with pytest.raises(DeadlineExceeded):
            await anext(service.complete(TextRequest("late", "", "b", timeout_s=0.02)))
    assert [request.request_id for request in text.requests] == ["r"]
    assert text.num_running == 0


async def test_the_stricter_of_client_s_and_operator_s_limit_counts() -> None:
    text = ScriptedText()
    service = AdmittedTextService(text, admission_of(), timeout_s=50)
    for timeout_s in (None, 20.0, 80.0):
        deltas = service.complete(TextRequest("r", "", "a", timeout_s=timeout_s))
        assert len([delta async for delta in deltas]) == 3
    limits = [request.timeout_s for request in text.requests]
    assert limits == [pytest.approx(50, abs=1), pytest.approx(20, abs=1), pytest.approx(50, abs=1)]


async def test_those_refused_are_not_all_told_to_come_back_at_once() -> None:
    now = 100.0
    gate = Admission(lambda: AdmissionConfig(max_running_per_primary=1, max_queued=0), lambda: 1, clock=lambda: now)
    await gate.acquire("running", 1)
    told = []
    for number in range(200):
        with pytest.raises(Overloaded) as refused:
            await gate.acquire(f"client {number}", 1)
        told.append(refused.value.retry_after_s)
    assert told[0] == 1.0
    assert told == sorted(told)
    assert told[50] == pytest.approx(2.0)  # fifty a second, while nothing is known of the pace
    now += 1000  # they have all been served since
    with pytest.raises(Overloaded) as refused:
        await gate.acquire("late", 1)
    assert refused.value.retry_after_s == 1.0


async def test_nobody_gives_up_a_place_for_one_that_is_refused_all_the_same() -> None:
    crowd = Crowd(admission_of(max_running_per_primary=1, max_queued=10, max_queued_per_client=8))
    for name in ("x0", *(f"a{i}" for i in range(6)), *(f"c{i}" for i in range(4))):
        await crowd.send(name)
    await crowd.send("b0", size=5)  # a's newest would make room for one of five; then a has no more than b would
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert set(crowd.refused) == {"b0"}


async def test_an_idle_hour_says_nothing_of_the_pace() -> None:
    now = 0.0
    config = AdmissionConfig(max_running_per_primary=1, max_queued=2, max_queued_per_client=2)
    crowd = Crowd(Admission(lambda: config, lambda: 1, lambda: now))
    await crowd.send("a0")
    await crowd.end("a0")
    now = 3600.0
    for name in ("a1", "a2", "a3"):
        await crowd.send(name)
    await crowd.end("a1")
    await crowd.send("a4")
    await crowd.send("b1")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert crowd.refused["a4"].retry_after_s == 1.0


async def test_a_client_over_its_own_share_sends_nobody_else_away_for_longer() -> None:
    config = AdmissionConfig(max_running_per_primary=1, max_queued=2, max_queued_per_client=1)
    crowd = Crowd(Admission(lambda: config, lambda: 1, lambda: 0.0))
    for name in ("x0", "a0", "b0"):
        await crowd.send(name)
    for index in range(1, 3000):
        await crowd.send(f"a{index}")
    await crowd.send("c0")
    assert crowd.refused["c0"].retry_after_s == 1.0


async def test_a_primary_that_comes_lets_in_who_waits() -> None:
    num_primaries = 1
    crowd = Crowd(admission_of(lambda: num_primaries))
    for name in ("a1", "a2", "a3", "b1", "b2"):
        await crowd.send(name)
    num_primaries = 2
    crowd.admission.refresh()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(crowd.let_in) == ["a1", "a2", "b1", "b2"]
