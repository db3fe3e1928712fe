"""What a drafter remembers: one growing KV buffer a sequence, all of them soft state under one budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.decoding.stopping_rules import TextOdds
from tandem_serve.engine.kv_cache import KvBudget, KvBuffer
from tandem_serve.errors import Overloaded
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import OpenSequence, SamplingParams

PLENTY = 0.75  # of the budget; while less is reserved, there is memory to draft ahead in
KV_BLOCK_SIZE = 64  # tokens; buffers grow by half of themselves, in whole blocks


@dataclass(slots=True, eq=False)
class DraftSequence:
    """One sequence of one peer.

    num_received positions are verified; of these all but `unrun` are in the buffer. `tail` are the tokens that MS has
    run behind them, its last block: where they prove right, a plain drafter keeps their keys and values. Unverified
    drafting goes on behind them.
    """

    peer_id: str
    sequence_id: str
    incarnation: int
    sampling: SamplingParams
    kv: KvBuffer
    reserved_tokens: int
    used_at_s: float
    num_received: int = 0
    unrun: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    odds: TextOdds = field(default_factory=TextOdds)

    @property
    def num_cached(self) -> int:
        return self.num_received - len(self.unrun)

    def receive_tokens(self, token_ids: tuple[int, ...]) -> None:
        """Verified tokens that MS must run itself (no representations), but for those that it has drafted."""
        num_known = 0
        if not self.unrun:
            for ours, theirs in zip(self.tail, token_ids, strict=False):
                if ours != theirs:
                    break
                num_known += 1
        self.unrun += token_ids[num_known:]
        self.tail = [] if self.unrun else self.tail[num_known:]
        self.num_received += len(token_ids)


class DraftCache:
    """The sequences of all peers, longest idle first. Makes room by evicting those, never one that is in use now."""

    def __init__(
        self, decoder: Decoder, config: DrafterEngineConfig, on_evict: Callable[[DraftSequence, str], None]
    ) -> None:
        self._decoder = decoder
        self._config = config
        self._on_evict = on_evict
        self._sequences: OrderedDict[tuple[str, str], DraftSequence] = OrderedDict()
        self._in_use: set[DraftSequence] = set()
        self.budget = KvBudget(config.kv_cache_tokens, KV_BLOCK_SIZE)

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[DraftSequence]:
        return iter(self._sequences.values())

    def begin_step(self) -> None:
        """From here on, what is opened or touched is in use."""
        self._in_use.clear()

    def get(self, peer_id: str, sequence_id: str) -> DraftSequence | None:
        return self._sequences.get((peer_id, sequence_id))

    def open(self, peer_id: str, command: OpenSequence, now_s: float) -> DraftSequence:
        """A new sequence, in place of one with the same id.

        Raises:
            Overloaded: every sequence held is in use, or there is no memory.
        """
        self.drop(peer_id, command.sequence_id)
        if len(self) >= self._config.max_num_seqs:
            self._evict_idle(f"{self._config.max_num_seqs} sequences are in use")
        while not self.budget.try_reserve(KV_BLOCK_SIZE):
            self._evict_idle("no room for another sequence in the KV cache")
        kv = KvBuffer(self._decoder.config, KV_BLOCK_SIZE, self._decoder.dtype, self._decoder.device)
        sequence = DraftSequence(
            peer_id, command.sequence_id, command.incarnation, command.sampling, kv, KV_BLOCK_SIZE, now_s
        )
        self._sequences[peer_id, command.sequence_id] = sequence
        self._in_use.add(sequence)
        return sequence

    def touch(self, sequence: DraftSequence, now_s: float) -> None:
        """Marks a sequence as in use: it is not evicted in this step, and last in the next."""
        sequence.used_at_s = now_s
        self._in_use.add(sequence)
        self._sequences.move_to_end((sequence.peer_id, sequence.sequence_id))

    def make_room(self, sequence: DraftSequence, num_positions: int) -> None:
        """Grows a sequence's buffer to num_positions.

        Raises:
            Overloaded: the sequences in use leave no memory for it.
        """
        if num_positions <= sequence.kv.capacity:
            return
        limit = self.budget.round_up(self._decoder.config.max_position_embeddings)
        wished = self.budget.round_up(num_positions + num_positions // 2)
        capacity = max(min(wished, limit), self.budget.round_up(num_positions))
        while not self._grow(sequence, capacity):
            self._evict_idle(f"no room for a sequence of {num_positions} positions in the KV cache")

    def spare_room(self, sequence: DraftSequence, num_positions: int) -> bool:
        """The same for what is not owed to anyone: whether there is room, without evicting, out of plenty alone."""
        if num_positions <= sequence.kv.capacity:
            return True
        return self.budget.usage < PLENTY and self._grow(sequence, self.budget.round_up(num_positions))

    def _grow(self, sequence: DraftSequence, capacity: int) -> bool:
        if not self.budget.try_reserve(capacity - sequence.reserved_tokens):
            return False
        sequence.reserved_tokens = capacity
        sequence.kv.grow(capacity, sequence.num_received + len(sequence.tail))
        return True

    def drop(self, peer_id: str, sequence_id: str) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        sequence = self._sequences.pop((peer_id, sequence_id), None)
        if sequence is not None:
            self.budget.release(sequence.reserved_tokens)

    def expire(self, now_s: float) -> None:
        """Evicts what has been idle for longer than idle_timeout_s."""
        while self._sequences and self.next_expiry_s() <= now_s:
            self._evict(next(iter(self)), f"idle for {self._config.idle_timeout_s} s")

    def next_expiry_s(self) -> float:
        """When the longest idle sequence expires; infinity where there is none."""
        longest_idle = next(iter(self), None)
        return float("inf") if longest_idle is None else longest_idle.used_at_s + self._config.idle_timeout_s

    def _evict_idle(self, why: str) -> None:
        longest_idle = next(iter(self), None)
        if longest_idle is None or longest_idle in self._in_use:
            raise Overloaded(why)
        self._evict(longest_idle, "evicted: the drafter ran out of room")

    def _evict(self, sequence: DraftSequence, why: str) -> None:
        self.drop(sequence.peer_id, sequence.sequence_id)
        self._on_evict(sequence, why)
