"""What every DrafterLink promises (interfaces.DrafterLink), whatever carries the messages and whoever drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import pytest

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.interfaces import Drafter, DrafterLink, LinkState
from tandem_serve.rpc.drafting_client import GrpcLinkFactory
from tandem_serve.rpc.drafting_server import DraftingServer
from tandem_serve.types import (
    CloseSequence,
    DraftBlock,
    DrafterInfo,
    ExtendSequence,
    PrimaryInfo,
    SequenceRejected,
)
from tests.engines import make_drafter_engine, tiny_primary
from tests.link_driver import Wake, events, ready
from tests.scripted_drafter import PRIMARY, ScriptedDrafter, extended, opened

CONFIG = DrafterEngineConfig()


@dataclass
class Linked:
    """A link to a drafter that is ready for it."""

    link: DrafterLink
    wake: Wake
    drafter: DrafterInfo

    def extended(self, sequence_id: str, start: int, count: int, *, asks: bool, round_: int = 1) -> ExtendSequence:
        ids, next_id = tuple(range(1, count + 1)), 7 if asks else None
        command = extended(sequence_id, 1, round_, start, ids, next_id, drafter=self.drafter)
        return command if self.drafter.taps else replace(command, representations=None)


@contextmanager
def running(engine: DrafterEngine) -> Iterator[DrafterEngine]:
    engine.start()
    yield engine
    engine.stop()


@contextmanager
def over_grpc(drafter: Drafter, primary: PrimaryInfo) -> Iterator[Linked]:
    server = DraftingServer(drafter, CONFIG)
    server.start()
    wake = Wake()
    link = GrpcLinkFactory()(server.address, primary, wake)
    ready(link, wake)
    yield Linked(link, wake, drafter.info)
    link.close()
    server.stop(0)


@contextmanager
def grpc_to_script() -> Iterator[Linked]:
    with over_grpc(ScriptedDrafter(), PRIMARY) as linked:
        yield linked


@contextmanager
def grpc_to_engine(kind: str) -> Iterator[Linked]:
    with running(make_drafter_engine(kind)) as engine, over_grpc(engine, tiny_primary()[1]) as linked:
        yield linked


@contextmanager
def local_to_engine() -> Iterator[Linked]:
    with running(make_drafter_engine()) as engine:
        wake = Wake()
        link = local_link_factory({"here": engine}, credit_bytes=CONFIG.credit_bytes)("here", tiny_primary()[1], wake)
        yield Linked(link, wake, engine.info)
        link.close()


@pytest.fixture(
    params=[grpc_to_script, lambda: grpc_to_engine("tandem"), lambda: grpc_to_engine("plain"), local_to_engine],
    ids=["grpc-script", "grpc-tandem", "grpc-plain", "local-tandem"],
)
def linked(request: pytest.FixtureRequest) -> Iterator[Linked]:
    make: Callable[[], AbstractContextManager[Linked]] = request.param
    with make() as linked:
        yield linked


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
    linked.wake.wait_until(lambda: not linked.link.receive() and linked.link.credit_bytes() == CONFIG.credit_bytes)


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
    linked.link.send([opened("a")])
    assert linked.link.receive() == []
    linked.link.close()  # twice does no harm
