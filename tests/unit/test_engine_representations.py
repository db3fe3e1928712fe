"""What a primary sends of its representations, what it keeps, and what it does when it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.interfaces import LinkState
from tandem_serve.types import (
    ExtendSequence,
)
from tests.engines import Output, drive, generate, make_engine, reference_tokens, tiny_drafter, tiny_primary
from tests.scripted_engine import REQUEST, causes, started, whole_text
from tests.scripted_link import Clock, ScriptedLink, block, oracle, silence


@pytest.fixture
def text() -> tuple[int, ...]:
    return whole_text()


@pytest.fixture
def right(text: tuple[int, ...]) -> ScriptedLink:
    """A drafter that is always right."""
    return ScriptedLink(tiny_drafter()[1], oracle({"r": text}))


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
