"""What every DrafterLink promises (interfaces.DrafterLink), whatever carries the messages and whoever drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.interfaces import DrafterLink, LinkState
from tandem_serve.rpc.drafting_client import GrpcLinkFactory
from tandem_serve.rpc.drafting_server import DraftingServer
from tandem_serve.types import (
    CloseSequence,
    DraftBlock,
    DrafterInfo,
    ExtendSequence,
    SequenceRejected,
)
from tests.link_driver import Wake, events, ready
from tests.scripted_drafter import DRAFTER, PRIMARY, ScriptedDrafter, opened

CONFIG = DrafterEngineConfig()


@dataclass
class Linked:
    """A link to a drafter that is ready for it."""

    link: DrafterLink
    wake: Wake
    drafter: DrafterInfo

    def extended(self, sequence_id: str, start: int, count: int, *, asks: bool, round_: int = 1) -> ExtendSequence:
        taps, width = len(self.drafter.taps), self.drafter.primary_hidden_size
        return ExtendSequence(
            sequence_id,
            incarnation=1,
            round=round_,
            start_position=start,
            token_ids=tuple(range(1, count + 1)),
            representations=torch.ones(count, taps, width),
            next_token_id=7 if asks else None,
            block_length=4,
        )


@pytest.fixture
def linked() -> Iterator[Linked]:
    server = DraftingServer(ScriptedDrafter(), CONFIG)
    server.start()
    wake = Wake()
    link = GrpcLinkFactory()(server.address, PRIMARY, wake)
    ready(link, wake)
    yield Linked(link, wake, DRAFTER)
    link.close()
    server.stop(0)


def test_a_ready_link_knows_its_drafter_and_has_all_its_credit(linked: Linked) -> None:
    assert linked.link.info == linked.drafter
    assert linked.link.epoch == 1
    assert linked.link.credit_bytes() == CONFIG.credit_bytes


def test_a_round_is_answered_and_its_credit_comes_back(linked: Linked) -> None:
    extend = linked.extended("a", 0, 3, asks=True, round_=5)
    linked.link.send([opened("a"), extend])
    (block,) = events(linked.link, linked.wake, 1)
    assert isinstance(block, DraftBlock)
    assert (block.sequence_id, block.incarnation, block.round) == ("a", 1, 5)
    assert 1 <= len(block.draft_token_ids) <= extend.block_length
    linked.wake.wait_until(lambda: linked.link.credit_bytes() == CONFIG.credit_bytes)


def test_only_the_last_chunk_of_a_prompt_is_answered(linked: Linked) -> None:
    linked.link.send([opened("a"), linked.extended("a", 0, 3, asks=False, round_=1)])
    linked.link.send([linked.extended("a", 3, 3, asks=False, round_=2)])
    linked.link.send([linked.extended("a", 6, 2, asks=True, round_=3)])
    (block,) = events(linked.link, linked.wake, 1)
    assert isinstance(block, DraftBlock)
    assert block.round == 3


def test_sequences_of_one_message_are_answered_each(linked: Linked) -> None:
    names = [f"s{i}" for i in range(5)]
    linked.link.send([opened(name) for name in names] + [linked.extended(name, 0, 2, asks=True) for name in names])
    found = events(linked.link, linked.wake, 5)
    assert sorted(event.sequence_id for event in found if isinstance(event, DraftBlock)) == names


def test_an_unknown_sequence_is_rejected_and_the_others_are_not(linked: Linked) -> None:
    linked.link.send([opened("a"), linked.extended("b", 0, 2, asks=True), linked.extended("a", 0, 2, asks=True)])
    found = events(linked.link, linked.wake, 2)
    rejected = [event for event in found if isinstance(event, SequenceRejected)]
    assert [(event.sequence_id, event.retryable) for event in rejected] == [("b", True)]
    assert [event.sequence_id for event in found if isinstance(event, DraftBlock)] == ["a"]


def test_a_sequence_starts_over_under_a_higher_incarnation(linked: Linked) -> None:
    linked.link.send([opened("a"), linked.extended("a", 0, 2, asks=True)])
    events(linked.link, linked.wake, 1)
    again = replace(linked.extended("a", 0, 4, asks=True, round_=2), incarnation=2)
    linked.link.send([opened("a", incarnation=2), again])
    (block,) = events(linked.link, linked.wake, 1)
    assert isinstance(block, DraftBlock)
    assert (block.incarnation, block.round) == (2, 2)


def test_a_closed_sequence_is_forgotten(linked: Linked) -> None:
    linked.link.send([opened("a"), linked.extended("a", 0, 2, asks=True)])
    events(linked.link, linked.wake, 1)
    linked.link.send([CloseSequence("a", 1), CloseSequence("never opened", 1)])
    linked.link.send([linked.extended("a", 2, 1, asks=True, round_=2)])
    (event,) = events(linked.link, linked.wake, 1)
    assert isinstance(event, SequenceRejected)


def test_a_closed_link_says_and_takes_nothing(linked: Linked) -> None:
    linked.link.close()
    assert linked.link.state is LinkState.CLOSED
    assert linked.link.credit_bytes() == 0
    linked.link.send([opened("a")])
    assert linked.link.receive() == []
    linked.link.close()  # twice does no harm
