"""Drafting ahead: what it has ready is what would have been drafted, and it never gets in the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.engine.draft_ahead import DraftAhead, OpenBlock
from tandem_serve.engine.draft_loop import DraftJob, draft_blocks
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.models.decoder import DecoderConfig
from tandem_serve.types import CloseSequence, SamplingParams
from tests.drafter_peer import TEXT, Peer, drafts_of, expected_drafts, extend, opening
from tests.engines import FAMILIES, GREEDY, make_drafter_engine, tiny_drafter, tiny_primary
from tests.scripted_link import Clock

SAMPLED = SamplingParams(temperature=1.3, seed=5)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)
@torch.inference_mode()
def test_every_ending_has_the_block_that_would_be_drafted_behind_it(
    model: DecoderConfig, sampling: SamplingParams
) -> None:
    decoder = tiny_primary(model)[0]
    verified, block = list(TEXT[:20]), (TEXT[20], 7, 8, 9)

    def cache() -> KvBuffer:
        kv = KvBuffer(decoder.config, 64, decoder.dtype, decoder.device)
        forward(decoder, [Rows(kv, 0, verified, 1)])
        return kv

    ahead = DraftAhead(decoder, OpenBlock(cache(), 20, block, sampling))
    num_passes = 0
    while not ahead.is_done:
        ahead.advance()
        num_passes += 1
    assert num_passes == 1 + 3
    for num_accepted in range(4):
        kept = block[: 1 + num_accepted]
        logits = forward(decoder, [Rows(cache(), 20, kept, 1)]).logits
        if num_accepted < 3:
            logits[0, block[num_accepted + 1]] = -torch.inf
        ending = _choose(logits, sampling, 20 + len(kept))
        (expected,) = draft_blocks(decoder, [DraftJob(cache(), 20, [*kept, ending], 3, sampling)])
        assert ahead.drafts_after(20, kept, ending) == tuple(expected)
        assert ahead.drafts_after(19, kept, ending) is None
        assert ahead.drafts_after(20, kept, ending + 1) is None


def _choose(logits: torch.Tensor, sampling: SamplingParams, position: int) -> int:
    from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids

    return int(choose_token_ids(logits, SamplingRows.from_params([(sampling, position)])).token_ids)


def _look_ahead(peer: Peer) -> int:
    num_passes = 0
    while peer.engine.draft_ahead():
        num_passes += 1
    return num_passes


def test_a_verdict_that_was_foreseen_is_answered_without_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(make_drafter_engine())
    (drafts,) = drafts_of(peer.ask(opening(), extend(0, 10))).values()
    assert _look_ahead(peer) == 1 + 4
    ending = _other_than(drafts[1], 10, (TEXT[10], drafts[0]))
    monkeypatch.setattr("tandem_serve.engine.draft_model.draft_blocks", None)  # would raise
    text = (*TEXT[:11], drafts[0], ending)
    (foreseen,) = drafts_of(peer.ask(extend(10, 12, round=2, text=text, block_length=3))).values()
    assert len(foreseen) == 3
    value = peer.engine.metrics.registry.get_sample_value
    assert value("tandem:drafter_ahead_rounds_total", {"result": "hit"}) == 1
    assert _look_ahead(peer) == 1 + 3  # and on, behind the block that came from ahead


@torch.inference_mode()
def _other_than(draft: int, start: int, kept: tuple[int, ...]) -> int:
    """What the tandem drafter thinks second best behind TEXT[:start] and the kept tokens of a block."""
    from tandem_serve.models.tandem import TandemDrafter
    from tests.dense_cache import DenseCache
    from tests.drafter_peer import representations

    model, _ = tiny_drafter()
    assert isinstance(model, TandemDrafter)
    cache = DenseCache(model.decoder.config, 200)
    known = torch.arange(start)
    cache.write(known, model.project(representations(TEXT[:start]), known))
    positions = torch.arange(start, start + len(kept))
    hidden = model.decoder(torch.tensor(kept), positions, cache.attend(positions)).hidden
    logits = model.decoder.logits(hidden)[-1:]
    logits[0, draft] = -torch.inf
    return _choose(logits, GREEDY, start + len(kept))


@settings(max_examples=25)
@given(data=st.data())
def test_what_is_drafted_ahead_leaves_no_trace(data: st.DataObject) -> None:
    """Whenever rounds arrive, before, amid or after it: a block that is drafted in time is what it always is."""
    peer = Peer(make_drafter_engine())
    peer.say(opening(sampling=SAMPLED))
    position = 0
    while position < 40:
        end = min(position + data.draw(st.integers(1, 12), "positions"), 40)
        wrong = data.draw(st.sampled_from([TEXT[end], 3]), "opening token")
        length = data.draw(st.integers(1, 6), "block length")
        peer.ask(extend(position, end, round=end, block_length=length, next_token_id=wrong))
        for _ in range(data.draw(st.integers(0, 8), "passes")):
            peer.engine.draft_ahead()
        position = end
    blocks = drafts_of(peer.ask(extend(40, 41, round=98, block_length=0), extend(41, 42, round=99, block_length=5)))
    assert blocks == {("s", 99): expected_drafts(42, 5, SAMPLED, "tandem")}


def test_unfinished_work_is_no_answer() -> None:
    peer = Peer(make_drafter_engine())
    peer.ask(opening(), extend(0, 10))
    assert peer.engine.draft_ahead()
    blocks = drafts_of(peer.ask(extend(10, 11, round=2)))
    assert blocks == {("s", 2): expected_drafts(11, 4, GREEDY, "tandem")}
    value = peer.engine.metrics.registry.get_sample_value
    assert value("tandem:drafter_ahead_rounds_total", {"result": "miss"}) == 1


def test_nothing_is_drafted_ahead_of_sequences_that_are_gone() -> None:
    clock = Clock()
    peer = Peer(make_drafter_engine(config=DrafterEngineConfig(idle_timeout_s=10.0), clock=clock))
    peer.ask(opening("a"), extend(name="a"), opening("b"), extend(name="b"))
    peer.ask(CloseSequence("a", 1))
    clock.now_s = 11.0
    peer.engine.step()
    assert _look_ahead(peer) == 0


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("plain", DrafterEngineConfig()),
        ("tandem", DrafterEngineConfig(draft_ahead=False)),
        ("tandem", DrafterEngineConfig(kv_cache_tokens=64)),  # no room for the branches
    ],
)
def test_where_nothing_can_be_drafted_ahead_rounds_go_on(kind: str, config: DrafterEngineConfig) -> None:
    peer = Peer(make_drafter_engine(kind, config))
    peer.ask(opening(), extend(0, 55, tandem=kind == "tandem"))
    assert _look_ahead(peer) == 0
    blocks = drafts_of(peer.ask(extend(55, 56, round=2, tandem=kind == "tandem")))
    assert blocks == {("s", 2): expected_drafts(56, 4, GREEDY, kind)}


def test_a_failure_ahead_costs_nothing_that_is_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(make_drafter_engine())
    peer.ask(opening(), extend(0, 10))
    with monkeypatch.context() as broken:
        broken.setattr("tandem_serve.engine.draft_ahead.forward", None)
        assert not peer.engine.draft_ahead()
    assert drafts_of(peer.ask(extend(10, 11, round=2))) == {("s", 2): expected_drafts(11, 4, GREEDY, "tandem")}
