"""The drafters that a primary knows: one link an address, and which of them takes the next sequence."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tandem_serve.interfaces import DrafterLink, LinkFactory, LinkState
from tandem_serve.types import DrafterInfo, DrafterLoad, PrimaryInfo

_log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 5.0  # how often a drafter that does not answer is given a new sequence, to see
_SMOOTHING = 0.1  # of waits
_OLD_S = 30.0  # a wait of so long ago says nothing of the next one
MAX_UNLISTED_LINKS = 32  # that requests have opened; each is a thread


@dataclass(slots=True, eq=False)
class DrafterPeer:
    """One drafter as the primary sees it."""

    link: DrafterLink
    num_attached: int = 0  # sequences that draft there
    num_naming: int = 0  # sequences that wish for it, whether they draft there or not
    num_surplus: int = 0  # of those, how many had better go to a drafter that has come since
    is_new: bool = True  # nothing has been shared with it since it became ready
    is_known: bool = True  # False: no new pairings; closed once its last sequence has left
    is_listed: bool = True  # False: a request has named it, and it stays for as long as it is of use
    is_refusal_logged: bool = False
    wait_s: float | None = None  # from asking for a block to having it; the mean of the last ones
    answered_at_s: float = 0.0
    next_probe_s: float | None = None  # it has missed a deadline and not answered since: no new sequences until then

    def observe_wait(self, seconds: float, now_s: float) -> None:
        """One block has come."""
        last = seconds if self.wait_s is None else self.wait_s
        self.wait_s = last + _SMOOTHING * (seconds - last)
        self.answered_at_s = now_s

    def ready_info(self) -> DrafterInfo | None:
        """Its handshake where it can be used now, else None."""
        return self.link.info if self.link.state is LinkState.READY else None

    @property
    def is_idle(self) -> bool:
        return self.num_attached == 0 and self.num_naming == 0

    @property
    def is_unused(self) -> bool:
        """Whether its link is to be closed."""
        is_wanted = self.is_known and (self.is_listed or self.link.state is LinkState.READY)
        return self.is_idle and not is_wanted


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

    def name(self, address: str) -> DrafterPeer | None:
        """The drafter that a request has named, until `unname`. None where there is no link to be had.

        A link opens early: its taps must be known at prefill. Whoever sends requests can name any address, so what
        they open is limited, and closed when it is of no use.
        """
        drafter = self._drafters.get(address)
        if drafter is None or drafter.link.state is LinkState.CLOSED:
            if not self._has_room_for_unlisted():
                _log.warning("no link to drafter %r: requests have opened %d already", address, MAX_UNLISTED_LINKS)
                return None
            drafter = self._open(address)
            if drafter is None:
                return None
            drafter.is_listed = False
        drafter.is_known = True
        drafter.num_naming += 1
        return drafter

    def unname(self, drafter: DrafterPeer) -> None:
        """The sequence that named it has ended."""
        drafter.num_naming -= 1
        self._close_if_unused(drafter)

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Exactly these take new sequences from now on. The others go when their last sequence has left."""
        wanted = set(addresses)
        for address in sorted(wanted):
            known = self._drafters.get(address)
            if known is None or known.link.state is LinkState.CLOSED:
                self._open(address)
        for address, drafter in list(self._drafters.items()):
            drafter.is_known = drafter.is_listed = address in wanted
            self._close_if_unused(drafter)

    def taps(self) -> tuple[int, ...]:
        """Every primary layer that some drafter reads, ascending.

        Also of drafters that are away for the moment; while none has been heard of, what was last known.
        """
        infos = [d.link.info for d in self if d.link.info is not None and d.link.state is not LinkState.REFUSED]
        if infos:
            self._taps = tuple(sorted({tap for info in infos for tap in info.taps}))
        return self._taps

    def pick(self, preferred: str | None, fits: Callable[[DrafterInfo], bool], now_s: float) -> DrafterPeer | None:
        """The drafter for one more sequence: the preferred one, else the least busy; ready and fitting. Or None.

        One that does not answer gets one sequence a probe interval: each waits for it until its deadline.
        """
        usable = [
            drafter
            for drafter in self
            if (info := drafter.ready_info()) is not None
            and fits(info)
            and (drafter.next_probe_s is None or now_s >= drafter.next_probe_s)
        ]
        picked = self._drafters.get(preferred) if preferred is not None else None
        if picked not in usable:
            picked = min((d for d in usable if d.is_known), key=lambda d: d.num_attached, default=None)
        if picked is not None and picked.next_probe_s is not None:
            picked.next_probe_s = now_s + PROBE_INTERVAL_S
        return picked

    def share_with_newcomers(self) -> None:
        """Where a listed drafter has become ready, the others have a surplus: what is beyond everybody's share."""
        usable = [drafter for drafter in self if drafter.is_known and drafter.ready_info() is not None]
        if not any(drafter.is_new and drafter.is_listed for drafter in usable):
            return
        share = math.ceil(sum(drafter.num_attached for drafter in usable) / len(usable))
        for drafter in usable:
            drafter.is_new = False
            drafter.num_surplus = max(drafter.num_attached - share, 0)

    def less_busy_than(self, drafter: DrafterPeer, fits: Callable[[DrafterInfo], bool]) -> DrafterPeer | None:
        """The least busy of those that answer and fit, where that is worth a move.

        Where no other one is less busy, there is no surplus any more.
        """
        others = [d for d in self if d is not drafter and d.is_known and d.ready_info() is not None]
        least = min((d.num_attached for d in others), default=drafter.num_attached)
        if least + 1 >= drafter.num_attached:
            drafter.num_surplus = 0  # it has come down by itself
            return None
        answering = [d for d in others if d.next_probe_s is None]
        fitting = [d for d in answering if (info := d.ready_info()) is not None and fits(info)]
        found = min(fitting, key=lambda d: d.num_attached, default=None)
        return found if found is not None and found.num_attached + 1 < drafter.num_attached else None

    def leave(self, drafter: DrafterPeer) -> None:
        """One sequence no longer drafts there."""
        drafter.num_attached -= 1
        drafter.num_surplus = max(drafter.num_surplus - 1, 0)
        self._close_if_unused(drafter)

    def tend(self) -> None:
        """Closes links that are of no use any more, and says once of each drafter that does not fit."""
        for drafter in list(self):
            is_refused = drafter.link.state is LinkState.REFUSED
            if is_refused and not drafter.is_refusal_logged:
                _log.warning("drafter %s refused this primary; it is not used", drafter.link.address)
            drafter.is_refusal_logged = is_refused
            if drafter.link.state is not LinkState.READY:
                drafter.is_new, drafter.next_probe_s = True, None  # whatever it was slow at is over
            self._close_if_unused(drafter)

    def states(self) -> tuple[tuple[str, str], ...]:
        """(address, link state) of each; safe from any thread."""
        return tuple((address, drafter.link.state.value) for address, drafter in list(self._drafters.items()))

    def loads(self, now_s: float) -> tuple[DrafterLoad, ...]:
        """Of each; safe from any thread."""
        return tuple(
            DrafterLoad(
                address, drafter.num_attached, drafter.wait_s if now_s - drafter.answered_at_s < _OLD_S else None
            )
            for address, drafter in list(self._drafters.items())
        )

    def close(self) -> None:
        for drafter in self:
            drafter.link.close()
        self._drafters.clear()

    def _open(self, address: str) -> DrafterPeer | None:
        if self._factory is None:
            return None
        try:
            drafter = DrafterPeer(self._factory(address, self._primary, self._wake))
        except Exception:  # an address that is none, say: the sequences that name it go on without
            _log.exception("no link to drafter %r", address)
            return None
        self._drafters[address] = drafter
        return drafter

    def _has_room_for_unlisted(self) -> bool:
        """Makes room where it can: a drafter that nobody uses at present goes for one that somebody wants."""
        unlisted = [drafter for drafter in self if not drafter.is_listed]
        if len(unlisted) < MAX_UNLISTED_LINKS:
            return True
        idle = next((drafter for drafter in unlisted if drafter.is_idle), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _close_if_unused(self, drafter: DrafterPeer) -> None:
        if drafter.is_unused:
            self._close(drafter)

    def _close(self, drafter: DrafterPeer) -> None:
        if self._drafters.get(drafter.link.address) is drafter:
            del self._drafters[drafter.link.address]
        drafter.link.close()
