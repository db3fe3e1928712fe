"""A drafter that stops answering costs the sequences that were there a wait, and new ones nothing."""

from __future__ import annotations

from dataclasses import replace

from tandem_serve.engine.drafter_links import PROBE_INTERVAL_S
from tandem_serve.types import OpenSequence
from tests.engines import Output, a_request, drive, make_engine, tiny_drafter
from tests.scripted_engine import REQUEST, causes, whole_text
from tests.scripted_link import Clock, ScriptedLink, block, oracle, silence


def opened(link: ScriptedLink) -> list[str]:
    return [command.sequence_id for command in link.commands if isinstance(command, OpenSequence)]


def test_new_sequences_do_not_wait_for_a_drafter_that_has_gone_silent() -> None:
    """Only one of them a probe interval does, to see."""
    link = ScriptedLink(tiny_drafter()[1], silence)
    clock = Clock()
    engine = make_engine(link_factory=link, clock=clock)
    engine.set_drafters(["d"])

    def seconds_for(name: str) -> float:
        started_s = clock.now_s
        engine.submit(a_request(name, max_tokens=8, drafter_address="d"), Output())
        drive(engine, clock)
        return clock.now_s - started_s

    assert [seconds_for(name) for name in "abc"] == [1.0, 0.0, 0.0]
    clock.now_s += PROBE_INTERVAL_S
    assert [seconds_for(name) for name in "def"] == [1.0, 0.0, 0.0]
    assert opened(link) == ["a", "d"]
    assert causes(engine)["no_drafter"] == 4 * 7


def test_a_drafter_that_answers_again_gets_new_sequences_at_once() -> None:
    """Even if the answer is too late for the sequence that had asked."""
    link = ScriptedLink(tiny_drafter()[1], silence)
    clock = Clock()
    engine = make_engine(link_factory=link, clock=clock)
    engine.set_drafters(["d"])
    engine.submit(a_request("a"), Output())
    while not link.lives.get("a") or not link.lives["a"].rounds:
        engine.step()
    late = block(link.lives["a"], link.lives["a"].rounds[0], ())
    drive(engine, clock)
    link.events.append(late)
    engine.step()
    engine.submit(a_request("b"), Output())
    drive(engine, clock)
    assert opened(link) == ["a", "b"]


def test_while_one_drafter_is_silent_another_one_does() -> None:
    text = whole_text()
    right = ScriptedLink(tiny_drafter()[1], oracle({"r": text, "next": text}))
    links = {"silent": ScriptedLink(tiny_drafter()[1], silence), "right": right}
    clock, output = Clock(), Output()
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(links)
    engine.submit(a_request("first", drafter_address="silent"), Output())
    drive(engine, clock)
    engine.submit(replace(REQUEST, request_id="next", drafter_address="silent"), output)
    drive(engine, clock)
    assert opened(links["silent"]) == ["first"] and opened(right) == ["next"]
    assert output.num_accepted_tokens > 90
