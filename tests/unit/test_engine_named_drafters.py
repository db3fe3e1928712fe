"""Drafters that requests name: their links are opened at once, are few, and do not outlive their use."""

from __future__ import annotations

import pytest

from tandem_serve.engine import drafter_links
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.interfaces import LinkState
from tandem_serve.types import PrimaryInfo
from tests.engines import Output, a_request, make_engine, tiny_drafter
from tests.scripted_link import ScriptedLink, block


class Addresses:
    """A LinkFactory: every address has a link, in the state given. Remembers them all."""

    def __init__(self, state: LinkState) -> None:
        self.state = state
        self.links: dict[str, ScriptedLink] = {}

    def __call__(self, address: str, primary: PrimaryInfo, wake: object) -> ScriptedLink:
        link = ScriptedLink(tiny_drafter()[1], lambda link, life, command: [block(life, command, ())])
        link.state = self.state
        self.links[address] = link
        return link(address, primary, wake)  # type: ignore[arg-type]


def engine_among(state: LinkState) -> tuple[TorchPrimary, Addresses]:
    addresses = Addresses(state)
    return make_engine(link_factory=addresses), addresses


def submit(engine: TorchPrimary, address: str, max_tokens: int = 4) -> None:
    engine.submit(a_request(address, max_tokens=max_tokens, drafter_address=address), Output())


def test_a_link_that_never_became_ready_goes_with_the_last_sequence_that_named_it() -> None:
    engine, addresses = engine_among(LinkState.CONNECTING)
    submit(engine, "a", 4)
    engine.submit(a_request("longer", max_tokens=8, drafter_address="a"), Output())
    while len(engine._sequences) != 1:
        engine.step()
    assert not addresses.links["a"].is_closed
    engine.run_until_idle()
    assert addresses.links["a"].is_closed
    assert engine.status().drafters == ()


def test_a_link_that_is_ready_stays_until_it_is_not() -> None:
    engine, addresses = engine_among(LinkState.READY)
    submit(engine, "a")
    engine.run_until_idle()
    engine.step()
    assert engine.status().drafters == (("a", "ready"),)
    addresses.links["a"].state = LinkState.CONNECTING
    engine.step()
    assert addresses.links["a"].is_closed and engine.status().drafters == ()


def test_listed_drafters_are_not_closed_whatever_their_state() -> None:
    engine, addresses = engine_among(LinkState.CONNECTING)
    engine.set_drafters(["a"])
    submit(engine, "a")
    engine.run_until_idle()
    engine.step()
    assert not addresses.links["a"].is_closed


def test_a_drafter_that_is_listed_later_stays() -> None:
    engine, addresses = engine_among(LinkState.CONNECTING)
    submit(engine, "a")
    engine.step()
    engine.set_drafters(["a"])
    engine.run_until_idle()
    engine.step()
    assert not addresses.links["a"].is_closed


@pytest.mark.parametrize("state", [LinkState.CONNECTING, LinkState.READY])
def test_requests_open_a_limited_number_of_links(state: LinkState, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many goes without while all are in use; later an idle one makes room."""
    monkeypatch.setattr(drafter_links, "MAX_UNLISTED_LINKS", 2)
    engine, addresses = engine_among(state)
    engine.set_drafters(["listed"])
    for address in "abc":
        submit(engine, address)
    engine.step()
    assert set(addresses.links) == {"listed", "a", "b"}
    engine.run_until_idle()
    submit(engine, "d")
    engine.run_until_idle()
    assert "d" in addresses.links and "c" not in addresses.links
    assert len(engine.status().drafters) <= 3
    assert not addresses.links["listed"].is_closed
