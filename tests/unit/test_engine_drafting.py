"""A primary and its drafters: who is asked, how long one waits, what is sent again, and what is counted."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.drafting import COOLDOWN_ROUNDS, MAX_REJECTIONS
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.interfaces import LinkState
from tandem_serve.types import (
    CloseSequence,
    ExtendSequence,
    OpenSequence,
    PrimaryInfo,
    SequenceRejected,
)
from tests.engines import Output, a_request, drive, generate, make_engine, reference_tokens, tiny_drafter, tiny_primary
from tests.scripted_link import Clock, Life, ScriptedLink, block, oracle, silence

REQUEST = a_request("r", range(4, 24), 120)


@pytest.fixture(scope="module")
def text() -> tuple[int, ...]:
    """REQUEST's whole sequence."""
    return REQUEST.prompt_token_ids + generate(make_engine(), [REQUEST])["r"].token_ids


@pytest.fixture
def right(text: tuple[int, ...]) -> ScriptedLink:
    """A drafter that is always right."""
    return ScriptedLink(tiny_drafter()[1], oracle({"r": text}))


def started(
    links: ScriptedLink | dict[str, ScriptedLink], config: PrimaryEngineConfig | None = None
) -> tuple[TorchPrimary, Output, Clock]:
    """An engine that knows these drafters, with REQUEST submitted."""
    links = {"a": links} if isinstance(links, ScriptedLink) else links
    clock, output = Clock(), Output()

    def connect(address: str, primary: PrimaryInfo, wake: object) -> ScriptedLink:
        return links[address](address, primary, wake)  # type: ignore[arg-type]

    engine = make_engine(config, link_factory=connect, clock=clock)
    engine.set_drafters(links)
    engine.submit(REQUEST, output)
    return engine, output, clock


def causes(engine: TorchPrimary) -> dict[str, int]:
    """Rounds without drafts, by cause."""
    samples = [
        s for m in engine.metrics.registry.collect() for s in m.samples if s.name.endswith("without_draft_total")
    ]
    return {s.labels["cause"]: int(s.value) for s in samples if s.value}


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


@pytest.mark.parametrize(("credit_bytes", "catches_up"), [(64, False), (140, False), (400, False), (1000, True)])
def test_scarce_credit_costs_drafts_and_nothing_else(
    credit_bytes: int, catches_up: bool, text: tuple[int, ...]
) -> None:
    """64 bytes open a sequence; a position is 4 + 2 * 3 taps * 32 bytes more. 400 carry one a step, 1000 four."""
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": text}), credit_bytes=credit_bytes)
    engine, output, clock = started(link)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert link.closed == ["r"]
    assert clock.now_s == 0.0  # nobody waits for credit
    found = causes(engine)
    if catches_up:
        assert 0 < found["no_credit"] < 100
        assert output.num_accepted_tokens > 0
    else:
        assert found.keys() == {"no_credit", "not_requested"}
        assert output.num_draft_tokens == 0


def test_out_of_log_memory_the_present_drafter_goes_on_but_none_can_take_over(text: tuple[int, ...]) -> None:
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": text}))
    memory = 40 * 3 * 32 * 4  # of about 140 positions
    engine, output, clock = started(link, PrimaryEngineConfig(representation_memory_bytes=memory))
    while len(output.token_ids) < 60:
        engine.step()
    assert causes(engine) == {}
    kept = engine.metrics.registry.get_sample_value("tandem:representation_log_bytes")
    assert kept is not None and kept <= memory
    link.reconnect()
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    found = causes(engine)
    assert found.keys() == {"lost", "evicted"} and found["evicted"] > 50
    assert engine.metrics.registry.get_sample_value("tandem:representation_log_bytes") == 0


def test_without_log_memory_sequences_go_on_alone(right: ScriptedLink, text: tuple[int, ...]) -> None:
    engine, output, clock = started(right, PrimaryEngineConfig(representation_memory_bytes=0))
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert causes(engine) == {"evicted": 119}


def test_plain_drafters_need_no_log_memory(text: tuple[int, ...]) -> None:
    link = ScriptedLink(tiny_drafter("plain")[1], oracle({"r": text}))
    engine, output, clock = started(link, PrimaryEngineConfig(representation_memory_bytes=0))
    while len(output.steps) < 6:
        engine.step()
    link.reconnect()
    drive(engine, clock)
    assert causes(engine) == {"lost": 1}
    assert output.num_accepted_tokens > 90


def test_drafters_with_different_taps_are_fed_by_one_primary(text: tuple[int, ...]) -> None:
    """Each sequence's log holds the union; each drafter gets its own columns (ScriptedLink checks the shapes)."""
    texts = dict.fromkeys(("p", "q", "r"), text)
    links = {
        "three taps": ScriptedLink(tiny_drafter("tandem")[1], oracle(texts)),
        "one tap": ScriptedLink(tiny_drafter("last")[1], oracle(texts)),
        "none": ScriptedLink(tiny_drafter("plain")[1], oracle(texts)),
    }
    clock = Clock()
    engine = make_engine(link_factory=lambda a, p, w: links[a](a, p, w), clock=clock)
    engine.set_drafters(links)
    outputs = {name: Output() for name in texts}
    for name, output in outputs.items():
        engine.submit(replace(REQUEST, request_id=name), output)
    while len(outputs["p"].steps) < 6:
        engine.step()
    assert all(link.lives for link in links.values())
    links["one tap"].state = links["none"].state = LinkState.CONNECTING
    drive(engine, clock)
    for output in outputs.values():
        assert REQUEST.prompt_token_ids + output.token_ids == text
        assert output.num_accepted_tokens > 90
    assert sorted(links["three taps"].closed) == ["p", "q", "r"]


def test_a_drafter_of_shorter_length_is_left_when_it_is_full(text: tuple[int, ...]) -> None:
    info = replace(tiny_drafter()[1], max_model_len=64)
    link = ScriptedLink(info, oracle({"r": text}))
    engine, output, clock = started(link)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    extends = [command for command in link.commands if isinstance(command, ExtendSequence)]
    assert max(c.start_position + len(c.token_ids) + c.block_length for c in extends) <= 64
    assert set(causes(engine)) == {"too_long"}


def test_wait_sleeps_until_the_deadline_or_an_event(right: ScriptedLink) -> None:
    """With real time: a step that has nothing to do says so, and wait returns when a block arrives, well before it."""
    right.script = silence
    engine = make_engine(PrimaryEngineConfig(draft_timeout_s=30.0), link_factory=right)
    engine.set_drafters(["a"])
    engine.submit(REQUEST, Output())
    while engine.step():
        pass
    assert not engine.step()  # no busy loop: the round is under way
    life = right.lives["r"]
    right.events.append(block(life, life.rounds[-1], (1, 2)))
    right.wake()
    engine.wait()
    assert engine.step()


def test_request_without_drafting_keeps_no_representations(right: ScriptedLink, text: tuple[int, ...]) -> None:
    clock, output = Clock(), Output()
    engine = make_engine(link_factory=right, clock=clock)
    engine.set_drafters(["a"])
    engine.submit(replace(REQUEST, block_length=0), output)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == text
    assert not right.commands
    assert causes(engine) == {"not_requested": 119}


def test_the_reference_is_what_plain_decoding_gives() -> None:
    short = replace(REQUEST, max_tokens=20)
    assert reference_tokens(tiny_primary()[0], short) == generate(make_engine(), [short])["r"].token_ids
