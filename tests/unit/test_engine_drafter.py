"""The drafter engine: right drafts for many peers at once, and nothing that a command says can hurt it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.errors import ModelMismatch
from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.types import (
    CloseSequence,
    CreditGranted,
    DraftBlock,
    DrafterCommand,
    DraftEvent,
    ExtendSequence,
    OpenSequence,
    SamplingParams,
    SequenceRejected,
    credit_cost_bytes,
)
from tests.checkpoints import CONFIG, VOCAB_SIZE
from tests.dense_cache import DenseCache
from tests.engines import GREEDY, make_drafter_engine, tiny_drafter, tiny_primary
from tests.scripted_link import Clock

SAMPLED = SamplingParams(temperature=1.3, seed=5)
TEXT = tuple(range(40, 120))
NUM_TAPS, WIDTH = CONFIG.num_layers, CONFIG.hidden_size


class Peer:
    """A primary's end of a stream, stepping the drafter by hand."""

    def __init__(self, engine: DrafterEngine, name: str = "p") -> None:
        self.engine, self.name = engine, name
        self.events: list[DraftEvent] = []
        self.num_deliveries = 0
        engine.connect(name, self._deliver)

    def _deliver(self, events: list[DraftEvent]) -> None:
        self.num_deliveries += 1
        self.events += events

    def say(self, *commands: DrafterCommand) -> None:
        self.engine.submit(self.name, commands)

    def ask(self, *commands: DrafterCommand) -> list[DraftEvent]:
        """Submits, steps, and returns what came back, credit aside."""
        self.say(*commands)
        self.engine.step()
        return self.take()

    def take(self) -> list[DraftEvent]:
        events = [event for event in self.events if not isinstance(event, CreditGranted)]
        self.events.clear()
        return events


@torch.inference_mode()
def representations(token_ids: Sequence[int]) -> Tensor:
    """The tiny primary's hidden states for the tandem drafter's taps, [n, num_taps, d]."""
    decoder = tiny_primary()[0]
    positions = torch.arange(len(token_ids))
    taps = tiny_drafter()[1].taps
    output = decoder(torch.tensor([list(token_ids)]), positions, causal_attention(CONFIG, len(token_ids)), taps)
    return torch.stack([tap[0] for tap in output.taps], 1)


def opening(name: str = "s", incarnation: int = 1, sampling: SamplingParams = GREEDY) -> OpenSequence:
    return OpenSequence(name, incarnation, sampling)


def extend(
    start: int = 0,
    end: int = 10,
    *,
    name: str = "s",
    incarnation: int = 1,
    round: int = 1,
    next_token_id: int | None = None,
    block_length: int = 4,
    tandem: bool = True,
    text: Sequence[int] = TEXT,
) -> ExtendSequence:
    """Positions start .. end - 1 of the text, and the one after them."""
    return ExtendSequence(
        sequence_id=name,
        incarnation=incarnation,
        round=round,
        start_position=start,
        token_ids=tuple(text[start:end]),
        representations=representations(text[:end])[start:] if tandem and end > start else None,
        next_token_id=text[end] if next_token_id is None else next_token_id,
        block_length=block_length,
    )


def quiet(command: ExtendSequence) -> ExtendSequence:
    """The same without asking for a block: a prompt chunk."""
    return replace(command, next_token_id=None, block_length=0)


@torch.inference_mode()
def expected_drafts(num_verified: int, block_length: int, sampling: SamplingParams, kind: str) -> tuple[int, ...]:
    """The drafts behind TEXT[:num_verified], token by token with the plainest cache."""
    model, _ = tiny_drafter(kind)
    decoder = model.decoder if isinstance(model, TandemDrafter) else model
    assert isinstance(decoder, Decoder)
    cache = DenseCache(decoder.config, 200)
    known = torch.arange(num_verified)
    if isinstance(model, TandemDrafter):
        cache.write(known, model.project(representations(TEXT[:num_verified]), known))
    else:
        decoder(torch.tensor(TEXT[:num_verified]), known, cache.attend(known))
    drafts: list[int] = []
    for i in range(block_length):
        position = torch.tensor([num_verified + i])
        token_id = torch.tensor([drafts[-1] if drafts else TEXT[num_verified]])
        logits = decoder.logits(decoder(token_id, position, cache.attend(position)).hidden)
        drafts.append(
            int(choose_token_ids(logits, SamplingRows.from_params([(sampling, num_verified + i + 1)])).token_ids)
        )
    return tuple(drafts)


def drafts_of(events: list[DraftEvent]) -> dict[tuple[str, int], tuple[int, ...]]:
    assert all(isinstance(event, DraftBlock) for event in events), events
    return {(e.sequence_id, e.round): e.draft_token_ids for e in events if isinstance(e, DraftBlock)}


# ------------------------------------------------------------------ drafting


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


# ------------------------------------------------------------------ bad commands

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
