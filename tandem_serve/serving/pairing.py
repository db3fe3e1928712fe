"""Which primary a sequence runs on and which drafter it is paired with: by load, prefix, distance. Pure logic.

Loads of primaries are this router's own counts: exact for one router, and with several a fair sample. Of drafters the
primaries say now and then what is paired with them, by whichever router, and moved since; own counts go on from there.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tandem_serve.config import PairingConfig
from tandem_serve.types import DrafterLoad

_MAX_PREFIXES = 65_536  # that are remembered
_PREFIXES_PER_PROMPT = 32  # of growing length
_NEAR = 1.25  # waits up to so many times the shortest are taken for equal
_FARTHEST = 4.0  # in terms of load: a drafter that is farther away still gets some sequences once the others are full
_OTHER_NODE = 1.25  # distance of a drafter that nothing has been measured of, and that is not on the primary's node


class Pool:
    """The members of a pool and how many sequences each carries for this router."""

    def __init__(self) -> None:
        self._members: tuple[str, ...] = ()
        self._running: Counter[str] = Counter()  # those of members that have left too, until they end
        self._turns: Counter[str] = Counter()

    @property
    def members(self) -> tuple[str, ...]:
        return self._members

    def num_running(self, member: str) -> int:
        return self._running[member]

    def set_members(self, members: Iterable[str]) -> None:
        """Who may get new sequences. Those that run elsewhere go on."""
        self._members = tuple(sorted(set(members)))
        newcomers_turn = min((self._turns[m] for m in self._members if m in self._turns), default=0)
        self._turns = Counter({m: self._turns.get(m, newcomers_turn) for m in self._members})

    def pick(self, exclude: Container[str] = (), load: Callable[[str], float] | None = None) -> str | None:
        """The least loaded member; of equals the one that has had the fewest turns. None where there is none.

        `load`: None: the sequences that it carries.
        """
        candidates = [member for member in self._members if member not in exclude]
        load = load or self.num_running
        return min(candidates, key=lambda member: (load(member), self._turns[member]), default=None)

    @contextmanager
    def carrying(self, member: str | None) -> Iterator[None]:
        """Counts one sequence on a member (None: on nobody) while the block runs."""
        if member is None:
            yield
            return
        self.start(member)
        try:
            yield
        finally:
            self.end(member)

    def start(self, member: str) -> None:
        """One more sequence on a member."""
        self._running[member] += 1
        self._turns[member] += 1

    def end(self, member: str) -> None:
        self._running[member] -= 1


class Pairing:
    """Both pools, and what is known of how they belong together. Belongs to one event loop."""

    def __init__(
        self, config: Callable[[], PairingConfig] = PairingConfig, seats: Callable[[], float] = lambda: math.inf
    ) -> None:
        """`config` and `seats`, the sequences that a primary takes at once, are asked anew each time."""
        self._config, self._seats = config, seats
        self.primaries, self.drafters = Pool(), Pool()
        self._nodes: Mapping[str, str] = {}
        self._measured: dict[str, Mapping[str, DrafterLoad]] = {}  # by primary, then drafter
        self._counted: Counter[str] = Counter()  # own sequences by drafter when that was last heard
        self._served_by: OrderedDict[int, str] = OrderedDict()  # by hash of a prompt's prefix, latest last

    def set_nodes(self, nodes: Mapping[str, str]) -> None:
        """Where members of either pool are, as far as that is known: by name or address."""
        self._nodes = nodes

    def counted(self) -> Counter[str]:
        """This router's sequences by drafter, at present."""
        return Counter({each: self.drafters.num_running(each) for each in self.drafters.members})

    def set_loads(self, measured: Mapping[str, Iterable[DrafterLoad]], counted: Counter[str]) -> None:
        """What each primary that answers asks of its drafters, and what was counted here when they were asked.

        What is not in there counts no more.
        """
        self._measured = {primary: {load.address: load for load in loads} for primary, loads in measured.items()}
        self._counted = counted

    def pick_primary(self, prompt: Sequence[int], exclude: Container[str] = ()) -> str | None:
        """The least loaded one, or one that has the longest part of the prompt in its cache and is hardly busier."""
        best = self.primaries.pick(exclude)
        if best is None:
            return None
        keys = self._prefixes(prompt)
        slack = self._config().prefix_slack
        for key in reversed(keys):
            known = self._served_by.get(key)
            if known is None or known in exclude or known not in self.primaries.members:
                continue
            running = self.primaries.num_running(known)
            if running <= self.primaries.num_running(best) + slack and running < self._seats():
                best = known
                break
        for key in keys:
            self._served_by[key] = best
            self._served_by.move_to_end(key)
        while len(self._served_by) > _MAX_PREFIXES:
            self._served_by.popitem(last=False)
        return best

    def pick_drafter(self, primary: str) -> str | None:
        """For a sequence of this primary. None where there is none."""
        measured = self._measured.get(primary, {})
        waits = {each: measured[each].wait_s for each in self.drafters.members if each in measured}
        nearest = min((wait_s for wait_s in waits.values() if wait_s), default=0.0)
        here = self._nodes.get(primary)

        def distance(drafter: str) -> float:
            wait_s, there = waits.get(drafter), self._nodes.get(drafter)
            if wait_s:
                return min(max(wait_s / (_NEAR * nearest), 1.0), _FARTHEST)
            return 1.0 if here is None or there is None or here == there else _OTHER_NODE

        # One at twice the distance has to have half of the load, the sequence that is to come included.
        return self.drafters.pick(load=lambda drafter: (self._load(drafter) + 1) * distance(drafter))

    def _load(self, drafter: str) -> int:
        """Sequences that are paired with it."""
        own = self.drafters.num_running(drafter)
        if not self._measured:
            return own
        paired = sum(loads[drafter].num_sequences for loads in self._measured.values() if drafter in loads)
        return max(paired + own - self._counted[drafter], 0)

    def _prefixes(self, prompt: Sequence[int]) -> list[int]:
        """Hashes of its beginnings, in steps of prefix_tokens; each hash includes the one before."""
        step = self._config().prefix_tokens or 0
        if not step:
            return []
        keys: list[int] = []
        for end in range(step, min(len(prompt), step * _PREFIXES_PER_PROMPT) + 1, step):
            keys.append(hash((keys[-1] if keys else 0, tuple(prompt[end - step : end]))))
        return keys
