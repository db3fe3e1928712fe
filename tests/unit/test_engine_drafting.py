"""A primary and its drafters: who is asked, how long one waits, what is sent again, and what is counted."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.drafting import COOLDOWN_ROUNDS, MAX_REJECTIONS, REJECTION_COOLDOWN_ROUNDS
from tandem_serve.interfaces import LinkState
from tandem_serve.types import (
    CloseSequence,
    ExtendSequence,
    OpenSequence,
    SequenceRejected,
)
from tests.engines import Output, a_request, drive, generate, make_engine, tiny_drafter
from tests.scripted_engine import REQUEST, causes, started, whole_text
from tests.scripted_link import Clock, Life, ScriptedLink, block, oracle, silence


@pytest.fixture
def text() -> tuple[int, ...]:
    return whole_text()


@pytest.fixture
def right(text: tuple[int, ...]) -> ScriptedLink:
    """A drafter that is always right."""
    return ScriptedLink(tiny_drafter()[1], oracle({"r": text}))


def test_a_silent_drafter_is_waited_for_less_and_less(text: tuple[int, ...]) -> None:
    """Each missed deadline costs one wait, then 8, 16, 32, 64 rounds go by without asking; then asking starts again."""
    link = ScriptedLink(tiny_drafter()[1], silence)
    engine, output, clock = started(link)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    # 119 rounds follow the first token: late, 8, late, 16, late, 32, late, and what is left of 64.
    assert causes(engine) == {"late": 4, "cooling_down": 8 + 16 + 32 + 59}
    assert clock.now_s == 4.0
    starts = [command.start_position for command in link.commands if isinstance(command, ExtendSequence)]
    assert starts == [0, 20, 20 + 9, 20 + 9 + 17]


def test_a_block_in_time_makes_the_next_cooldown_short_again(text: tuple[int, ...]) -> None:
    right = oracle({"r": text})

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> object:
        return [] if command.round in (1, 2, 4) else right(link, life, command)

    engine, _, clock = started(ScriptedLink(tiny_drafter()[1], script))  # type: ignore[arg-type]
    drive(engine, clock)
    found = causes(engine)
    assert found["late"] == 3
    assert found["cooling_down"] == COOLDOWN_ROUNDS + 2 * COOLDOWN_ROUNDS + COOLDOWN_ROUNDS


def test_a_late_block_is_dropped(text: tuple[int, ...]) -> None:
    """It arrives after its deadline, when the sequence is past it."""
    wrong = tuple((token_id + 1) % 288 for token_id in text[:5])

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> object:
        return []

    link = ScriptedLink(tiny_drafter()[1], script)  # type: ignore[arg-type]
    engine, output, clock = started(link)
    while not link.lives.get("r") or not link.lives["r"].rounds:
        engine.step()
    asked = link.lives["r"].rounds[0]
    clock.now_s += 1.0
    assert engine.step()
    link.events.append(block(link.lives["r"], asked, wrong))
    drive(engine, clock)
    assert output.num_draft_tokens == 0
    assert REQUEST.prompt_token_ids + output.token_ids == text


def test_a_drafter_that_comes_back_is_shown_everything_again(right: ScriptedLink, text: tuple[int, ...]) -> None:
    """Killed amid a round: no wait, no changed token; acceptance is back with the next round."""
    engine, output, clock = started(right)
    while len(output.steps) < 6:
        engine.step()
    right.state = LinkState.CONNECTING
    right.reconnect()
    while len(output.steps) < 12:
        assert engine.step()
    assert [step.num_draft_tokens for step in output.steps[6:]] == [0] * 6
    right.state = LinkState.READY
    drive(engine, clock)
    assert clock.now_s == 0.0
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert causes(engine) == {"lost": 1, "no_drafter": 6}  # the sixth ran while the sequence was shown again
    opens = [command.incarnation for command in right.commands if isinstance(command, OpenSequence)]
    assert len(opens) == 2 and opens[1] > opens[0]
    again = right.commands.index(OpenSequence("r", opens[1], REQUEST.sampling)) + 1
    resent = right.commands[again]
    assert isinstance(resent, ExtendSequence)
    assert resent.start_position == 0 and len(resent.token_ids) > 40  # in one go: the whole sequence so far


def test_a_quick_restart_between_two_steps_is_noticed(right: ScriptedLink, text: tuple[int, ...]) -> None:
    """The link is READY before and after, only the epoch says so."""
    engine, output, clock = started(right)
    while len(output.steps) < 6:
        engine.step()
    right.reconnect()
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert causes(engine) == {"lost": 1}


def test_another_drafter_behind_the_link_in_mid_step_costs_no_request(text: tuple[int, ...]) -> None:
    """Its taps are not those that the sequences remember. The swap falls between a step's receiving and its sending."""
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": text}))
    engine, output, clock = started(link)
    assert link.info is not None and 3 not in link.info.taps
    other = replace(link.info, taps=(3,))

    def swap(*_: object) -> None:
        if len(output.steps) == 5 and link.epoch == 1:
            link.reconnect()
            link.info = other

    engine.metrics.generation_tokens.inc = swap  # type: ignore[method-assign]  # called for each sequence of a step
    drive(engine, clock)
    assert not output.errors
    assert REQUEST.prompt_token_ids + output.token_ids == text


def test_sequences_move_to_another_drafter(text: tuple[int, ...]) -> None:
    links = {name: ScriptedLink(tiny_drafter()[1], oracle({"r": text})) for name in "ab"}
    engine, output, clock = started(links)
    while len(output.steps) < 6:
        engine.step()
    first, second = (links["a"], links["b"]) if links["a"].commands else (links["b"], links["a"])
    assert not second.commands
    first.state = LinkState.CONNECTING
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert second.closed == ["r"]
    assert causes(engine) == {"lost": 1}


def test_the_preferred_drafter_is_used_and_others_are_shared_out(text: tuple[int, ...]) -> None:
    links = {
        name: ScriptedLink(tiny_drafter()[1], lambda link, life, command: [block(life, command, ())]) for name in "abc"
    }
    clock = Clock()
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(["a", "b"])
    for i in range(4):
        engine.submit(a_request(f"r{i}"), Output())
    for i in range(4, 6):
        engine.submit(a_request(f"r{i}", drafter_address="c"), Output())
    drive(engine, clock)
    opened = {
        name: {c.sequence_id for c in link.commands if isinstance(c, OpenSequence)} for name, link in links.items()
    }
    assert opened["c"] >= {"r4", "r5"}  # a drafter that a request has named is known from then on
    assert all(len(opened[name] - {"r4", "r5"}) in (1, 2) for name in links)


def test_without_the_preferred_drafter_another_one_does(right: ScriptedLink, text: tuple[int, ...]) -> None:
    away = ScriptedLink(tiny_drafter()[1], silence)
    away.state = LinkState.CONNECTING
    links = {"away": away, "here": right}
    clock, output = Clock(), Output()
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(["here"])
    engine.submit(replace(REQUEST, drafter_address="away"), output)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert output.num_accepted_tokens > 90 and not away.commands


def test_a_removed_drafter_keeps_its_sequences_and_gets_no_new_ones(text: tuple[int, ...]) -> None:
    links = {name: ScriptedLink(tiny_drafter()[1], oracle({"r": text, "next": text})) for name in "ab"}
    clock, output = Clock(), Output()
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(["a"])
    engine.submit(REQUEST, output)
    while len(output.steps) < 4:
        engine.step()
    engine.set_drafters(["b"])
    engine.submit(replace(REQUEST, request_id="next"), Output())
    drive(engine, clock)
    assert links["a"].is_closed and links["a"].lives.keys() == {"r"}
    assert links["b"].closed == ["next"] and not links["b"].is_closed
    assert causes(engine) == {}
    assert engine.status().drafters == (("b", "ready"),)


def test_a_drafter_that_comes_takes_its_share_of_what_runs(text: tuple[int, ...]) -> None:
    names = [f"r{i}" for i in range(6)]
    links = {name: ScriptedLink(tiny_drafter()[1], oracle(dict.fromkeys(names, text))) for name in "ab"}
    clock, outputs = Clock(), {name: Output() for name in names}
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(["a"])
    for name in names:
        engine.submit(replace(REQUEST, request_id=name, drafter_address="a"), outputs[name])
    while len(outputs["r5"].steps) < 4:
        engine.step()
    engine.set_drafters(["a", "b"])
    drive(engine, clock)
    moved = {command.sequence_id for command in links["b"].commands if isinstance(command, OpenSequence)}
    assert len(moved) == 3
    assert moved == set(links["a"].closed[:3]) == set(links["b"].closed)
    assert all(REQUEST.prompt_token_ids + output.token_ids == text for output in outputs.values())


def test_a_drafter_that_comes_back_after_it_has_been_slow_takes_its_share(text: tuple[int, ...]) -> None:
    names = [f"r{i}" for i in range(6)]
    links = {name: ScriptedLink(tiny_drafter()[1], oracle(dict.fromkeys(names, text))) for name in "ab"}
    right, links["b"].script = links["b"].script, silence
    clock, outputs = Clock(), {name: Output() for name in names}
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(["a", "b"])
    for name in names:
        engine.submit(replace(REQUEST, request_id=name), outputs[name])
    for _ in range(4):
        engine.step()
    clock.now_s += 1.0  # b misses the deadline
    engine.step()
    links["b"].state = LinkState.CONNECTING
    engine.step()
    assert {load.address: load.num_sequences for load in engine.status().loads} == {"a": 6, "b": 0}
    links["b"].state, links["b"].epoch, links["b"].script = LinkState.READY, 2, right
    links["b"].lives.clear()
    engine.step()
    assert {load.address: load.num_sequences for load in engine.status().loads} == {"a": 3, "b": 3}
    drive(engine, clock)
    assert all(REQUEST.prompt_token_ids + output.token_ids == text for output in outputs.values())


def test_sequences_near_their_end_stay_where_they_are(text: tuple[int, ...]) -> None:
    links = {name: ScriptedLink(tiny_drafter()[1], oracle(dict.fromkeys(("r", "s"), text))) for name in "ab"}
    clock, output = Clock(), Output()
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(["a"])
    for name in ("r", "s"):
        engine.submit(replace(REQUEST, request_id=name), output if name == "r" else Output())
    while len(output.token_ids) < REQUEST.max_tokens - 30:
        engine.step()
    engine.set_drafters(["a", "b"])
    drive(engine, clock)
    assert not links["b"].commands


def test_a_refusing_drafter_is_never_used_and_logged_once(
    right: ScriptedLink, text: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    right.state = LinkState.REFUSED
    with caplog.at_level(logging.WARNING):
        engine, output, clock = started(right)
        drive(engine, clock)
    assert [record.args for record in caplog.records] == [("a",)]
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert not right.commands
    assert set(causes(engine)) == {"no_drafter"}


def test_an_address_without_a_drafter_costs_the_drafts_alone(text: tuple[int, ...]) -> None:
    engine, output, clock = started({"a": ScriptedLink(tiny_drafter()[1], oracle({"r": text}))})
    engine.set_drafters(["nowhere", "a"])
    drive(engine, clock)
    assert output.num_accepted_tokens > 90


@pytest.mark.parametrize(("retryable", "num_lives"), [(True, MAX_REJECTIONS + 1), (False, 1)])
def test_rejected_sequences_are_opened_again_a_few_times(
    retryable: bool, num_lives: int, text: tuple[int, ...]
) -> None:
    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> list[SequenceRejected]:
        return [SequenceRejected("r", life.opened.incarnation, "no room", retryable)]

    link = ScriptedLink(tiny_drafter()[1], script)
    engine, output, clock = started(link)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert sum(isinstance(command, OpenSequence) for command in link.commands) == num_lives
    assert causes(engine) == {"rejected": 119}


def test_rejections_are_counted_since_the_last_block(text: tuple[int, ...]) -> None:
    """A sequence that is evicted now and then is opened again each time, after a few rounds alone."""
    right = oracle({"r": text})
    evictions = []

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> object:
        if len(life.rounds) == 1:
            return right(link, life, command)
        evictions.append(command)
        return [SequenceRejected("r", life.opened.incarnation, "evicted", True)]

    link = ScriptedLink(tiny_drafter()[1], script)  # type: ignore[arg-type]
    engine, output, clock = started(link, PrimaryEngineConfig(block_length=4))
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert len(evictions) > 2 * MAX_REJECTIONS
    assert causes(engine) == {"rejected": len(evictions) * REJECTION_COOLDOWN_ROUNDS}


def test_abort_closes_the_sequence_at_its_drafter(right: ScriptedLink) -> None:
    engine, output, _ = started(right)
    while len(output.steps) < 4:
        engine.step()
    engine.abort("r")
    engine.step()
    assert right.closed == ["r"]
    assert isinstance(right.commands[-1], CloseSequence)
    assert right.lives == {}


def test_an_id_that_is_used_again_is_a_new_life(right: ScriptedLink, text: tuple[int, ...]) -> None:
    engine, _, clock = started(right)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + generate(engine, [REQUEST])["r"].token_ids == text
    assert right.closed == ["r", "r"]  # ScriptedLink itself insists that incarnations rise
