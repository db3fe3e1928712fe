"""The drafter engine: right drafts for many peers at once, within bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.errors import ModelMismatch
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.types import (
    CloseSequence,
    CreditGranted,
    DraftBlock,
    DraftEvent,
    PolicyName,
    SamplingParams,
    SequenceRejected,
    StoppingRule,
    credit_cost_bytes,
)
from tests.drafter_peer import (
    TEXT,
    Peer,
    drafts_of,
    expected_drafts,
    extend,
    opening,
    quiet,
)
from tests.engines import GREEDY, make_drafter_engine, tiny_drafter, tiny_primary
from tests.scripted_link import Clock

SAMPLED = SamplingParams(temperature=1.3, seed=5)


@pytest.mark.parametrize("kind", ["tandem", "plain"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_blocks_of_many_lengths_and_peers_are_drafted_together(kind: str, sampling: SamplingParams) -> None:
    engine = make_drafter_engine(kind)
    peers = [Peer(engine, name) for name in "ab"]
    lengths = {"x": 1, "y": 7, "z": 3}
    for number, peer in enumerate(peers):
        for name, length in lengths.items():
            command = extend(0, 5 + number + length, name=name, block_length=length, tandem=kind == "tandem")
            peer.say(opening(name, sampling=sampling), command)
    assert engine.step()
    assert not engine.step()
    for number, peer in enumerate(peers):
        assert peer.num_deliveries == 1
        assert drafts_of(peer.take()) == {
            (name, 1): expected_drafts(5 + number + length, length, sampling, kind) for name, length in lengths.items()
        }


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["tandem", "plain"])
def test_drafts_depend_on_the_verified_text_alone(kind: str, data: st.DataObject) -> None:
    """However it arrives: in chunks, round by round, with rounds that turned out right, wrong or out of date."""
    peer = Peer(make_drafter_engine(kind))
    peer.ask(opening(sampling=SAMPLED))
    position, last = 0, data.draw(st.integers(1, 40), "end")
    text = list(TEXT)
    while position < last:
        end = min(position + data.draw(st.integers(1, 12), "positions"), last)
        command = extend(position, end, round=end, block_length=data.draw(st.integers(1, 6)), tandem=kind == "tandem")
        if data.draw(st.booleans(), "asks"):
            # What was opened with another token than the text goes on with is a round that went wrong.
            wrong = data.draw(st.sampled_from([text[end], 3]), "opening token")
            peer.ask(replace(command, next_token_id=wrong))
        else:
            peer.say(quiet(command))
        position = end
    peer.engine.step()
    peer.take()
    blocks = drafts_of(peer.ask(extend(last, last, round=99, block_length=5)))
    assert blocks == {("s", 99): expected_drafts(last, 5, SAMPLED, kind)}


def test_a_plain_drafter_keeps_what_it_drafted_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fully accepted block of 4 only the last draft and the new token are run: two tokens, not six."""
    peer = Peer(make_drafter_engine("plain"))
    decoder, _ = tiny_drafter("plain")
    assert isinstance(decoder, Decoder)
    events = peer.ask(opening(), extend(0, 10, tandem=False))
    (drafts,) = drafts_of(events).values()
    text = (*TEXT[:11], *drafts, 77)
    widths: list[int] = []
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda ids: widths.append(len(ids)) or embed(ids))
    again = peer.ask(extend(10, 15, round=2, text=text, tandem=False))
    assert widths == [2, 1, 1, 1]
    fresh = Peer(make_drafter_engine("plain")).ask
    assert drafts_of(again)["s", 2] == drafts_of(fresh(opening(), extend(0, 15, text=text, tandem=False)))["s", 1]


def test_only_the_latest_round_of_a_sequence_is_drafted() -> None:
    peer = Peer(make_drafter_engine())
    blocks = drafts_of(peer.ask(opening(), extend(0, 10, round=1), extend(10, 12, round=2), extend(12, 13, round=3)))
    assert blocks == {("s", 3): expected_drafts(13, 4, GREEDY, "tandem")}
    assert peer.ask(extend(13, 14, round=4), quiet(extend(14, 15, round=5))) == []


def test_a_block_of_no_drafts_is_answered_at_once() -> None:
    peer = Peer(make_drafter_engine())
    assert drafts_of(peer.ask(opening(), extend(block_length=0))) == {("s", 1): ()}


def test_half_precision_representations_are_taken() -> None:
    peer = Peer(make_drafter_engine())
    command = extend(0, 10)
    assert command.representations is not None
    events = peer.ask(opening(), replace(command, representations=command.representations.bfloat16()))
    assert len(drafts_of(events)["s", 1]) == 4


def test_a_long_prompt_runs_through_a_plain_drafter_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_serve.engine.draft_model.MAX_BATCHED_TOKENS", 16)
    peer = Peer(make_drafter_engine("plain"))
    blocks = drafts_of(
        peer.ask(opening(), extend(0, 60, tandem=False), opening("t"), extend(0, 50, name="t", tandem=False))
    )
    assert blocks["s", 1] == expected_drafts(60, 4, GREEDY, "plain")
    assert blocks["t", 1] == expected_drafts(50, 4, GREEDY, "plain")


# ------------------------------------------------------------------ memory, peers, credit


def test_the_longest_idle_sequence_makes_room() -> None:
    peer = Peer(make_drafter_engine(config=DrafterEngineConfig(max_num_seqs=2)))
    peer.ask(opening("a"), extend(name="a"))
    peer.ask(opening("b"), extend(name="b"))
    peer.ask(extend(10, 11, name="a", round=2))
    (event,) = peer.ask(opening("c"))
    assert isinstance(event, SequenceRejected) and event.sequence_id == "b" and event.retryable
    assert len(drafts_of(peer.ask(extend(11, 12, name="a", round=3), extend(name="c")))) == 2


def test_sequences_in_use_are_not_evicted_for_one_another() -> None:
    peer = Peer(make_drafter_engine(config=DrafterEngineConfig(max_num_seqs=2)))
    events = peer.ask(*(opening(name) for name in "abc"), *(extend(name=name) for name in "ab"))
    (rejection,) = [event for event in events if isinstance(event, SequenceRejected)]
    assert rejection.sequence_id == "c" and rejection.retryable
    assert len(events) == 3


def test_kv_memory_is_bounded_and_comes_back() -> None:
    """256 tokens in blocks of 64: two sequences of 70 fill it, a third one takes the place of the first."""
    engine = make_drafter_engine(config=DrafterEngineConfig(kv_cache_tokens=256))
    peer = Peer(engine)
    value = engine.metrics.registry.get_sample_value
    for name in "abc":
        events = peer.ask(opening(name), extend(0, 70, name=name))
        assert len(drafts_of([e for e in events if isinstance(e, DraftBlock)])[name, 1]) == 4
    assert value("tandem:drafter_num_sequences") == 2
    assert value("tandem:drafter_kv_cache_usage_perc") == 1.0
    peer.ask(*(CloseSequence(name, 1) for name in "bc"))
    assert value("tandem:drafter_kv_cache_usage_perc") == 0.0


def test_a_sequence_larger_than_all_memory_is_rejected() -> None:
    peer = Peer(make_drafter_engine(config=DrafterEngineConfig(kv_cache_tokens=64)))
    (event,) = peer.ask(opening(), extend(0, 70))
    assert isinstance(event, SequenceRejected)
    assert len(drafts_of(peer.ask(opening(incarnation=2), extend(0, 20, incarnation=2)))["s", 1]) == 4


def test_buffers_grow_and_keep_their_contents() -> None:
    peer = Peer(make_drafter_engine())
    peer.ask(opening(), extend(0, 50))
    blocks = drafts_of(peer.ask(extend(50, 62, round=2)))
    assert blocks == {("s", 2): expected_drafts(62, 4, GREEDY, "tandem")}


def test_idle_sequences_are_dropped() -> None:
    clock = Clock()
    peer = Peer(make_drafter_engine(config=DrafterEngineConfig(idle_timeout_s=10.0), clock=clock))
    peer.ask(opening("a"), opening("b"))
    clock.now_s = 6.0
    peer.ask(extend(name="b"))
    clock.now_s = 10.0
    assert peer.engine.step()
    (event,) = peer.take()
    assert isinstance(event, SequenceRejected) and event.sequence_id == "a" and event.retryable
    assert not peer.engine.step()


def test_credit_comes_back_for_everything_taken_in() -> None:
    peer = Peer(make_drafter_engine())
    commands = [opening(), extend(), extend(name="nobody"), CloseSequence("s", 1)]
    peer.say(*commands)
    peer.engine.step()
    granted = sum(event.num_bytes for event in peer.events if isinstance(event, CreditGranted))
    assert granted == sum(map(credit_cost_bytes, commands))


def test_peers_have_their_own_sequences_and_take_them_along() -> None:
    engine = make_drafter_engine()
    one, two = Peer(engine, "one"), Peer(engine, "two")
    one.ask(opening(), extend())
    two.ask(opening(), extend(0, 20))
    engine.disconnect("one")
    assert len(drafts_of(two.ask(extend(20, 21, round=2)))) == 1
    assert one.ask(extend(10, 11, round=2)) == []  # not connected: nobody to answer
    back = Peer(engine, "one")
    (event,) = back.ask(extend(10, 11, round=2))
    assert isinstance(event, SequenceRejected) and event.retryable


def test_a_peer_whose_stream_fails_is_disconnected() -> None:
    engine = make_drafter_engine()

    def broken(_: list[DraftEvent]) -> None:
        raise ConnectionError("the stream has ended")

    engine.connect("broken", broken)
    engine.submit("broken", [opening(), extend()])
    assert len(drafts_of(Peer(engine, "good").ask(opening(), extend()))) == 1
    assert engine.metrics.registry.get_sample_value("tandem:drafter_num_sequences") == 1


def test_a_failing_pass_costs_its_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(make_drafter_engine())
    model, _ = tiny_drafter()
    assert isinstance(model, TandemDrafter)

    def fail(*_: object) -> None:
        raise RuntimeError("a kernel gave up")

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "logits", fail)
        (event,) = peer.ask(opening(), extend())
    assert isinstance(event, SequenceRejected) and event.retryable and "a kernel gave up" in event.message
    assert len(drafts_of(peer.ask(opening(incarnation=2), extend(incarnation=2)))) == 1


def test_check_primary_names_what_differs() -> None:
    engine, info = make_drafter_engine(), tiny_primary()[1]
    engine.check_primary(info)
    with pytest.raises(ModelMismatch, match="fingerprint"):
        engine.check_primary(replace(info, fingerprint="another"))
    with pytest.raises(ModelMismatch, match="vocab_size"):
        make_drafter_engine("plain").check_primary(replace(info, vocab_size=7))


@pytest.mark.parametrize("kind", ["tandem", "plain"])
def test_a_text_s_odds_are_learnt_from_what_is_verified(kind: str) -> None:
    """The primary says in its next round what the drafts have come to."""
    engine = make_drafter_engine(kind)
    peer = Peer(engine)
    rule = StoppingRule(PolicyName.OPTIMAL, threshold=0.0)
    command = replace(extend(0, 10, block_length=4, tandem=kind == "tandem"), stopping=rule)
    (drafts,) = drafts_of(peer.ask(opening(), command)).values()
    (sequence,) = engine._cache
    assert len(drafts) == 4 and sequence.odds.shift == 0
    right = (*TEXT[:11], *drafts)
    peer.ask(quiet(extend(10, 13, round=2, text=right, tandem=kind == "tandem")))
    assert sequence.odds.shift > 0
    wrong = (*TEXT[:11], drafts[0] + 1, 5, 6)
    other = Peer(engine, "q")
    other.ask(opening(), command)
    other.ask(quiet(extend(10, 12, round=2, text=wrong, tandem=kind == "tandem")))
    assert [each.odds.shift < 0 for each in engine._cache if each.peer_id == "q"] == [True]
