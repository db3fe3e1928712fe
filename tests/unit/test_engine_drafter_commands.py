"""Nothing that a command says can hurt the drafter engine, or another sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.types import (
    CloseSequence,
    DraftBlock,
    DrafterCommand,
    ExtendSequence,
    OpenSequence,
    PolicyName,
    SamplingParams,
    SequenceRejected,
    StoppingRule,
)
from tests.checkpoints import VOCAB_SIZE
from tests.drafter_peer import (
    NUM_TAPS,
    TEXT,
    WIDTH,
    Peer,
    drafts_of,
    expected_drafts,
    extend,
    opening,
)
from tests.engines import GREEDY, make_drafter_engine, tiny_drafter

_GOOD = extend(0, 10)
_STATES = _GOOD.representations
assert _STATES is not None
MALFORMED: dict[str, DrafterCommand] = {
    "unknown sequence": extend(name="nobody"),
    "another incarnation": extend(incarnation=2),
    "gap": replace(_GOOD, start_position=1),
    "negative position": replace(_GOOD, start_position=-1),
    "no representations": replace(_GOOD, representations=None),
    "too few representations": replace(_GOOD, representations=_STATES[:9]),
    "taps missing": replace(_GOOD, representations=_STATES[:, :1]),
    "too narrow": replace(_GOOD, representations=_STATES[:, :, :-1]),
    "flat": replace(_GOOD, representations=_STATES.flatten()),
    "whole numbers": replace(_GOOD, representations=_STATES.long()),
    "not a number": replace(_GOOD, representations=torch.full_like(_STATES, torch.nan)),
    "one infinite number": replace(_GOOD, representations=_STATES.index_fill(0, torch.tensor([3]), torch.inf)),
    "no tensor": replace(_GOOD, representations=[[0.0]]),  # type: ignore[arg-type]
    "token id too large": replace(_GOOD, token_ids=(VOCAB_SIZE, *_GOOD.token_ids[1:])),
    "token id negative": replace(_GOOD, token_ids=(-1, *_GOOD.token_ids[1:])),
    "next token too large": replace(_GOOD, next_token_id=VOCAB_SIZE),
    "next token negative": replace(_GOOD, next_token_id=-1),
    "block too long": replace(_GOOD, block_length=17),
    "block of negative length": replace(_GOOD, block_length=-1),
    "behind drafts that were never made": replace(
        _GOOD, token_ids=(), representations=None, start_position=0, num_unverified=1
    ),
    "behind verified tokens and drafts": replace(_GOOD, num_unverified=1),
    "a negative number of drafts": replace(_GOOD, num_unverified=-1),
    "a rule of no policy": replace(_GOOD, stopping=StoppingRule(PolicyName.FIXED)),
    "a threshold that is no share": replace(_GOOD, stopping=StoppingRule(PolicyName.ROUTER, float("nan"))),
    "token ids of another type": replace(_GOOD, token_ids=("a",) * 10),  # type: ignore[arg-type]
    "no token ids": replace(_GOOD, token_ids=None),  # type: ignore[arg-type]
    "opened twice": opening(),
    "temperature not a number": opening(incarnation=2, sampling=replace(GREEDY, temperature=float("nan"))),
    "top_p of 0": opening(incarnation=2, sampling=replace(GREEDY, top_p=0.0)),
    "seed of 65 bits": opening(incarnation=2, sampling=replace(GREEDY, seed=1 << 64)),
    "id too long": opening("x" * 129),
    "no sampling": OpenSequence("t", 1, None),  # type: ignore[arg-type]
    "no command at all": "hello",  # type: ignore[dict-item]
    "unhashable id": OpenSequence([], 1, GREEDY),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_commands_cost_one_sequence_at_most(name: str) -> None:
    """The neighbour in the same message is drafted as if nothing had happened."""
    peer = Peer(make_drafter_engine())
    peer.ask(opening(), opening("good"))
    events = peer.ask(MALFORMED[name], extend(name="good"))
    rejections = [event for event in events if isinstance(event, SequenceRejected)]
    assert len(rejections) == 1 and rejections[0].message
    assert rejections[0].retryable == (name in ("unknown sequence", "another incarnation"))
    blocks = drafts_of([event for event in events if isinstance(event, DraftBlock)])
    assert blocks == {("good", 1): expected_drafts(10, 4, GREEDY, "tandem")}


def test_a_sequence_that_outgrows_the_drafter_is_rejected() -> None:
    drafter, info = tiny_drafter()
    peer = Peer(DrafterEngine(drafter, replace(info, max_model_len=16), DrafterEngineConfig()))
    assert len(drafts_of(peer.ask(opening(), extend(0, 12)))["s", 1]) == 4
    (event,) = peer.ask(extend(12, 13, round=2))
    assert isinstance(event, SequenceRejected) and "16 positions" in event.message and not event.retryable


def test_a_plain_drafter_refuses_representations() -> None:
    peer = Peer(make_drafter_engine("plain"))
    (event,) = peer.ask(opening(), extend(tandem=True))
    assert isinstance(event, SequenceRejected)


def test_stale_commands_leave_the_present_life_alone() -> None:
    peer = Peer(make_drafter_engine())
    peer.ask(opening(incarnation=5), extend(0, 10, incarnation=5))
    (event,) = peer.ask(extend(0, 10, incarnation=4), CloseSequence("s", 4), CloseSequence("nobody", 1))
    assert event == SequenceRejected("s", 4, "incarnation 4 of this sequence is not open here", True)
    blocks = drafts_of(peer.ask(extend(10, 11, incarnation=5, round=2)))
    assert blocks == {("s", 2): expected_drafts(11, 4, GREEDY, "tandem")}


def test_a_higher_incarnation_starts_over() -> None:
    peer = Peer(make_drafter_engine())
    peer.ask(opening(), extend(0, 30))
    blocks = drafts_of(peer.ask(opening(incarnation=2), extend(0, 10, incarnation=2)))
    assert blocks == {("s", 1): expected_drafts(10, 4, GREEDY, "tandem")}


_values = st.one_of(st.none(), st.integers(-5, 300), st.integers(), st.text(max_size=3), st.just(float("nan")))
_tensors = st.one_of(
    st.none(), st.just(_STATES), st.just(_STATES[:0]), st.just(torch.zeros(0)), st.just(torch.ones(2, NUM_TAPS, WIDTH))
)
_commands = st.one_of(
    st.builds(OpenSequence, st.sampled_from("stu"), st.integers(0, 4), st.builds(SamplingParams, _values, _values)),
    st.builds(CloseSequence, st.sampled_from("stu"), st.integers(0, 4)),
    st.builds(
        ExtendSequence,
        st.sampled_from("stu"),
        st.integers(0, 4),
        _values,
        st.one_of(st.sampled_from([0, 2, 10]), _values),
        st.one_of(
            st.lists(st.integers(-1, 300), max_size=4).map(tuple), st.just(TEXT[:10]), st.lists(_values).map(tuple)
        ),
        _tensors,
        _values,
        _values,
    ),
)


@settings(max_examples=150)
@given(messages=st.lists(st.lists(_commands, max_size=4), max_size=4))
def test_the_engine_survives_anything(messages: list[list[DrafterCommand]]) -> None:
    engine = make_drafter_engine()
    bad, good = Peer(engine, "bad"), Peer(engine, "good")
    for message in messages:
        bad.say(*message)
        engine.step()
    assert drafts_of(good.ask(opening(), extend())) == {("s", 1): expected_drafts(10, 4, GREEDY, "tandem")}
