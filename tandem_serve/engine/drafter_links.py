"""The drafters that a primary knows: one link an address, and which of them takes the next sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tandem_serve.interfaces import DrafterLink, LinkFactory, LinkState
from tandem_serve.types import DrafterInfo, PrimaryInfo

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class DrafterPeer:
    """One drafter as the primary sees it."""

    link: DrafterLink
    num_attached: int = 0  # sequences that draft there
    is_known: bool = True  # False: no new pairings; closed once its last sequence has left
    is_refusal_logged: bool = False

    def ready_info(self) -> DrafterInfo | None:
        """Its handshake where it can be used now, else None."""
        return self.link.info if self.link.state is LinkState.READY else None


class DrafterLinks:
    """Opens, picks and closes links. Belongs to the engine's thread; the links themselves are thread-safe."""

    def __init__(self, factory: LinkFactory | None, primary: PrimaryInfo, wake: Callable[[], None]) -> None:
        self._factory = factory
        self._primary = primary
        self._wake = wake
        self._drafters: dict[str, DrafterPeer] = {}
        self._taps: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[DrafterPeer]:
        return iter(self._drafters.values())

    def know(self, address: str) -> None:
        """Opens a link to address unless there is one. Links open early: their taps must be known at prefill."""
        known = self._drafters.get(address)
        if known is not None and known.link.state is not LinkState.CLOSED:
            known.is_known = True
        elif self._factory is not None:
            try:
                self._drafters[address] = DrafterPeer(self._factory(address, self._primary, self._wake))
            except Exception:  # an address that is none, say: the sequences that name it go on without
                _log.exception("no link to drafter %r", address)

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Exactly these take new sequences from now on. The others go when their last sequence has left."""
        wanted = set(addresses)
        for address in sorted(wanted):
            self.know(address)
        for address, drafter in list(self._drafters.items()):
            drafter.is_known = address in wanted
            self._close_if_unused(drafter)

    def taps(self) -> tuple[int, ...]:
        """Every primary layer that some drafter reads, ascending.

        Also of drafters that are away for the moment; while none has been heard of, what was last known.
        """
        infos = [d.link.info for d in self if d.link.info is not None and d.link.state is not LinkState.REFUSED]
        if infos:
            self._taps = tuple(sorted({tap for info in infos for tap in info.taps}))
        return self._taps

    def pick(self, preferred: str | None, fits: Callable[[DrafterInfo], bool]) -> DrafterPeer | None:
        """The drafter for one more sequence: the preferred one, else the least busy; ready and fitting. Or None."""
        if preferred is not None and (drafter := self._drafters.get(preferred)) is not None:
            info = drafter.ready_info()
            if info is not None and fits(info):
                return drafter
        usable = [d for d in self if d.is_known and (info := d.ready_info()) is not None and fits(info)]
        return min(usable, key=lambda d: d.num_attached, default=None)

    def leave(self, drafter: DrafterPeer) -> None:
        """One sequence no longer drafts there."""
        drafter.num_attached -= 1
        self._close_if_unused(drafter)

    def log_refusals(self) -> None:
        """Says once of each drafter that does not fit this primary that it is not used."""
        for drafter in self:
            is_refused = drafter.link.state is LinkState.REFUSED
            if is_refused and not drafter.is_refusal_logged:
                _log.warning("drafter %s refused this primary; it is not used", drafter.link.address)
            drafter.is_refusal_logged = is_refused

    def states(self) -> tuple[tuple[str, str], ...]:
        """(address, link state) of each; safe from any thread."""
        return tuple((address, drafter.link.state.value) for address, drafter in list(self._drafters.items()))

    def close(self) -> None:
        for drafter in self:
            drafter.link.close()
        self._drafters.clear()

    def _close_if_unused(self, drafter: DrafterPeer) -> None:
        if not drafter.is_known and drafter.num_attached == 0:
            drafter.link.close()
            if self._drafters.get(drafter.link.address) is drafter:
                del self._drafters[drafter.link.address]
