"""A Drafter without a model, for tests of what carries messages to one, and the records that such tests send."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tandem_serve.errors import ModelMismatch
from tandem_serve.types import (
    CloseSequence,
    CreditGranted,
    DraftBlock,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    ExtendSequence,
    OpenSequence,
    PrimaryInfo,
    SamplingParams,
    SequenceRejected,
    credit_cost_bytes,
    mismatches,
)

PRIMARY = PrimaryInfo(
    model="primary",
    fingerprint="sha256:p",
    tokenizer_hash="sha256:t",
    vocab_size=100,
    hidden_size=8,
    num_layers=4,
    max_model_len=512,
)
DRAFTER = DrafterInfo(
    model="drafter",
    fingerprint="sha256:d",
    primary_fingerprint="sha256:p",
    tokenizer_hash="sha256:t",
    vocab_size=100,
    taps=(2, 4),
    primary_hidden_size=8,
    max_block_length=8,
    max_model_len=512,
)


def opened(sequence_id: str = "a", incarnation: int = 1) -> OpenSequence:
    return OpenSequence(sequence_id, incarnation, SamplingParams(temperature=0.8, top_p=0.9, top_k=7, seed=-5))


def extended(
    sequence_id: str = "a",
    incarnation: int = 1,
    round_: int = 1,
    start_position: int = 0,
    token_ids: tuple[int, ...] = (1, 2, 3),
    next_token_id: int | None = 10,
    block_length: int = 4,
    drafter: DrafterInfo = DRAFTER,
) -> ExtendSequence:
    shape = (len(token_ids), len(drafter.taps), drafter.primary_hidden_size)
    values = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) / 8  # exact in bfloat16 while small
    return ExtendSequence(
        sequence_id, incarnation, round_, start_position, token_ids, values, next_token_id, block_length
    )


def drafts(next_token_id: int, block_length: int) -> tuple[int, ...]:
    """What ScriptedDrafter answers: it counts."""
    return tuple((next_token_id + i) % DRAFTER.vocab_size for i in range(1, block_length + 1))


@dataclass
class _Peer:
    deliver: Callable[[list[DraftEvent]], None]
    open: dict[str, int] = field(default_factory=dict)  # incarnations


class ScriptedDrafter:
    """interfaces.Drafter that counts on from the token it is given.

    Answers within submit(), or, while `paused`, keeps what arrives for resume(): a drafter that is slow. `received`
    holds every command there ever was, in order.
    """

    def __init__(self, info: DrafterInfo = DRAFTER) -> None:
        self.info = info
        self.received: list[DrafterCommand] = []
        self.peers: dict[str, _Peer] = {}
        self.paused = False
        self.changed = threading.Condition()
        self._waiting: list[tuple[str, Sequence[DrafterCommand]]] = []

    def check_primary(self, primary: PrimaryInfo) -> None:
        if problems := mismatches(primary, self.info):
            raise ModelMismatch("; ".join(problems))

    def connect(self, peer_id: str, deliver: Callable[[list[DraftEvent]], None]) -> None:
        with self.changed:
            assert peer_id not in self.peers
            self.peers[peer_id] = _Peer(deliver)
            self.changed.notify_all()

    def submit(self, peer_id: str, commands: Sequence[DrafterCommand]) -> None:
        with self.changed:
            self.received.extend(commands)
            if self.paused:
                self._waiting.append((peer_id, commands))
            else:
                self._answer(peer_id, commands)
            self.changed.notify_all()

    def disconnect(self, peer_id: str) -> None:
        with self.changed:
            del self.peers[peer_id]  # a second disconnect is a fault
            self.changed.notify_all()

    def resume(self) -> None:
        with self.changed:
            self.paused = False
            for peer_id, commands in self._waiting:
                self._answer(peer_id, commands)
            self._waiting.clear()

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        with self.changed:
            assert self.changed.wait_for(holds, timeout_s), "the drafter never got there"

    def _answer(self, peer_id: str, commands: Sequence[DrafterCommand]) -> None:
        peer = self.peers.get(peer_id)
        if peer is None:
            return
        events: list[DraftEvent] = [CreditGranted(sum(map(credit_cost_bytes, commands)))]
        for command in commands:
            key = command.sequence_id
            if isinstance(command, OpenSequence):
                peer.open[key] = command.incarnation
            elif isinstance(command, CloseSequence):
                peer.open.pop(key, None)
            elif peer.open.get(key) != command.incarnation:
                events.append(SequenceRejected(key, command.incarnation, "unknown sequence", retryable=True))
            elif command.next_token_id is not None:
                block = drafts(command.next_token_id, command.block_length)
                events.append(DraftBlock(key, command.incarnation, command.round, block, 0.001))
        peer.deliver(events)
