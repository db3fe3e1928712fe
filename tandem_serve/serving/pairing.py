"""Which primary a sequence runs on and which drafter it is paired with: by load, prefix, distance. Pure logic.

Loads are this router's own counts: exact for one router, and with several a fair sample. The round trip to a drafter,
which the primaries measure, also shows what others ask of it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tandem_serve.config import PairingConfig

_MAX_PREFIXES = 65_536  # that are remembered
_PREFIXES_PER_PROMPT = 32  # of growing length
_NEAR = 1.25  # round trips up to so many times the shortest are taken for equal
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

    def pick(self, exclude: Container[str] = (), distance: Callable[[str], float] = lambda _: 1.0) -> str | None:
        """The least loaded member; of equals the one that has had the fewest turns. None where there is none.

        One at twice the distance has to have half of the load, the sequence that is to come included.
        """
        candidates = [member for member in self._members if member not in exclude]

        def rank(member: str) -> tuple[float, int]:
            return (self._running[member] + 1) * distance(member), self._turns[member]

        return min(candidates, key=rank, default=None)

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

    def __init__(self, config: Callable[[], PairingConfig] = PairingConfig) -> None:
        """`config` is asked anew each time."""
        self._config = config
        self.primaries, self.drafters = Pool(), Pool()
        self._nodes: Mapping[str, str] = {}
        self._round_trips: dict[str, Mapping[str, float]] = {}
        self._served_by: OrderedDict[int, str] = OrderedDict()  # by hash of a prompt's prefix, latest last

    def set_nodes(self, nodes: Mapping[str, str]) -> None:
        """Where members of either pool are, as far as that is known: by name or address."""
        self._nodes = nodes

    def set_round_trips(self, primary: str, seconds: Mapping[str, float]) -> None:
        """What a primary has measured of late, by drafter. None of them counts any more that is not in there."""
        self._round_trips[primary] = seconds

    def set_primaries(self, names: Iterable[str]) -> None:
        self.primaries.set_members(names)
        self._round_trips = {name: self._round_trips.get(name, {}) for name in self.primaries.members}

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
            if self.primaries.num_running(known) <= self.primaries.num_running(best) + slack:
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
        measured = self._round_trips.get(primary, {})
        nearest = min((measured[each] for each in self.drafters.members if each in measured), default=0.0)
        here = self._nodes.get(primary)

        def distance(drafter: str) -> float:
            if drafter in measured and nearest > 0:
                return min(max(measured[drafter] / (_NEAR * nearest), 1.0), _FARTHEST)
            there = self._nodes.get(drafter)
            return 1.0 if here is None or there is None or here == there else _OTHER_NODE

        return self.drafters.pick(distance=distance)

    def _prefixes(self, prompt: Sequence[int]) -> list[int]:
        """Hashes of its beginnings, in steps of prefix_tokens; each hash includes the one before."""
        step = self._config().prefix_tokens or 0
        if not step:
            return []
        keys: list[int] = []
        for end in range(step, min(len(prompt), step * _PREFIXES_PER_PROMPT) + 1, step):
            keys.append(hash((keys[-1] if keys else 0, tuple(prompt[end - step : end]))))
        return keys
