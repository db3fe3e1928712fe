"""The drafter engine: takes in verified positions of many primaries' sequences and drafts behind them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.engine.draft_ahead import DraftsAhead
from tandem_serve.engine.draft_cache import DraftCache, DraftSequence
from tandem_serve.engine.draft_model import DraftModel
from tandem_serve.engine.threads import yield_to_io
from tandem_serve.engine.validation import check_extend, check_open
from tandem_serve.errors import InvalidRequest, ModelMismatch, Overloaded, TandemError, Unavailable
from tandem_serve.metrics import DrafterMetrics
from tandem_serve.models.acceptance import AcceptanceModel
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.tracing import Span, SpanSink, TraceContext, discard
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
    SequenceRejected,
    credit_cost_bytes,
    mismatches,
)

_log = logging.getLogger(__name__)
_requests = logging.getLogger("tandem_serve.requests")

MAX_FAILED_STEPS = 5  # in a row; with more a drafter is no longer healthy

Deliver = Callable[[list[DraftEvent]], None]


@dataclass(slots=True)
class _Peer:
    """One primary's stream."""

    deliver: Deliver
    events: list[DraftEvent] = field(default_factory=list)  # of the present step
    num_credit_bytes: int = 0


class DrafterEngine:
    """Owns MS and its KV cache (implements interfaces.Drafter).

    MS may be a tandem drafter, whose verified positions are written from representations, or a plain decoder, which
    runs verified tokens itself. `connect`, `submit` and `disconnect` are safe from any thread and only queue; all else
    happens in `step`, on one thread: `start` runs it in a thread of its own, or the caller steps by hand.

    Nothing in a command can stop the engine. What is wrong with a sequence is answered by a SequenceRejected and costs
    that sequence alone.
    """

    def __init__(
        self,
        model: TandemDrafter | Decoder,
        info: DrafterInfo,
        config: DrafterEngineConfig,
        *,
        acceptance: AcceptanceModel | None = None,  # None: policies that want one make do without
        metrics: DrafterMetrics | None = None,
        spans: SpanSink = discard,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics or DrafterMetrics()
        self._spans = spans
        self._info = info
        self._model = DraftModel(model, acceptance)
        self._clock = clock
        self._cache = DraftCache(self._model.decoder, config, self._on_evict)
        self._ahead = DraftsAhead(self._model.decoder)
        self._may_draft_ahead = config.draft_ahead
        self._peers: dict[str, _Peer] = {}
        self._wake = threading.Event()
        self._inbox: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._num_failed_steps = 0  # in a row
        # Of the present step: what each sequence is to take in, and the latest round that asks for a block.
        self._arrived: dict[DraftSequence, list[ExtendSequence]] = {}
        self._rounds: dict[DraftSequence, ExtendSequence] = {}
        self._blocks: dict[DraftSequence, tuple[int, ...]] = {}  # that it has sent: opening token and drafts
        self._oldest_s = math.inf  # when the first of what it took in had arrived

    # -------------------------------------------------------------- any thread

    @property
    def info(self) -> DrafterInfo:
        return self._info

    @property
    def is_healthy(self) -> bool:
        """Whether the thread of `start` is alive and its latest steps have not all failed."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and self._num_failed_steps < MAX_FAILED_STEPS

    def check_primary(self, primary: PrimaryInfo) -> None:
        """See interfaces.Drafter."""
        if found := mismatches(primary, self._info):
            raise ModelMismatch("; ".join(found))

    def connect(self, peer_id: str, deliver: Deliver) -> None:
        """See interfaces.Drafter. A peer that connects again starts without sequences."""
        self._post(lambda: self._connect(peer_id, deliver))

    def submit(self, peer_id: str, commands: Sequence[DrafterCommand]) -> None:
        """See interfaces.Drafter. Commands of peers that are not connected are dropped."""
        arrived_at_s = self._clock()
        self._post(lambda: self._apply_all(peer_id, commands, arrived_at_s))

    def disconnect(self, peer_id: str) -> None:
        """See interfaces.Drafter."""
        self._post(lambda: self._disconnect(peer_id))

    def start(self) -> None:
        """Steps in a thread of its own until `stop`."""
        if self._thread is not None:
            raise RuntimeError("the drafter engine is running already")
        self._is_stopping = False
        self._thread = threading.Thread(target=self._loop, name="drafter-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step."""
        if self._thread is not None:
            self._is_stopping = True
            self._wake.set()
            self._thread.join()
            self._thread = None

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)  # a deque's append is atomic
        self._wake.set()

    # -------------------------------------------------------------- the engine's thread

    def _loop(self) -> None:
        yield_to_io()
        while not self._is_stopping:
            try:
                if self.step() or self.draft_ahead():
                    continue
            except Exception:
                _log.exception("a drafter step failed")
                self._num_failed_steps += 1
            began = self._clock()
            left = self._cache.next_expiry_s() - began
            self._wake.wait(None if math.isinf(left) else max(left, 0.0))
            if not math.isinf(left):
                self.metrics.starved.inc(self._clock() - began)

    @torch.inference_mode()
    def step(self) -> bool:
        """Takes in all that has arrived, then drafts the latest round of each sequence. False: there was nothing."""
        self._wake.clear()  # before the inbox is read, so that nothing is missed
        started = self._clock()
        self._cache.begin_step()
        self._oldest_s = math.inf
        had_work = bool(self._inbox)
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()
        self._answer_from_ahead(started)
        self._guard(self._take_in, self._arrived)
        has_drafted = self._guard(lambda: self._draft(started), self._rounds)
        self._begin_ahead()
        self._arrived.clear()
        self._rounds.clear()
        self._cache.expire(started)
        has_events = self._deliver()
        self.metrics.sequences.set(len(self._cache))
        self.metrics.kv_cache_usage.set(self._cache.budget.usage)
        if had_work:
            elapsed = max(self._clock() - started, 0.0)
            self.metrics.draft_time.observe(elapsed)
            self.metrics.busy.inc(elapsed)
        if has_drafted:
            self._num_failed_steps = 0
            self.metrics.draft_wait.observe(self._clock() - self._oldest_s)
        return had_work or has_events

    @torch.inference_mode()
    def draft_ahead(self) -> bool:
        """One pass towards the blocks that may be asked for next. False: there is nothing to do.

        For when `step` has had nothing to do. An engine that is stepped by hand drafts ahead only where told to.
        """
        try:
            return self._ahead.advance()
        except Exception:  # what is drafted ahead is never owed to anyone
            _log.exception("drafting ahead failed; what there was of it is dropped")
            self._ahead.clear()
            return False

    def _guard(self, stage: Callable[[], None], involved: Mapping[DraftSequence, object]) -> bool:
        """Runs one stage of a step; should it raise, the sequences involved are dropped and the engine goes on.

        Whether it ran, and well.
        """
        if not involved:
            return False
        try:
            stage()
        except Exception as error:
            self._num_failed_steps += 1
            _log.exception("a stage of a drafter step failed; its %d sequences are dropped", len(involved))
            for sequence in list(involved):
                self._give_up(sequence, Unavailable(f"the drafter failed: {error}"))
            return False
        return True

    # -------------------------------------------------------------- peers and commands

    def _connect(self, peer_id: str, deliver: Deliver) -> None:
        self._disconnect(peer_id)
        self._peers[peer_id] = _Peer(deliver)

    def _disconnect(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)
        for sequence in [each for each in self._cache if each.peer_id == peer_id]:
            self._forget(sequence)

    def _apply_all(self, peer_id: str, commands: Sequence[DrafterCommand], arrived_at_s: float) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        self._oldest_s = min(self._oldest_s, arrived_at_s)
        for command in commands:
            try:
                peer.num_credit_bytes += credit_cost_bytes(command)
                self._apply(peer_id, command)
            except TandemError as error:
                self._reject(peer_id, command.sequence_id, command.incarnation, error)
            except Exception as error:  # a field of another type than its annotation says, or no command at all
                sequence_id, incarnation = getattr(command, "sequence_id", ""), getattr(command, "incarnation", 0)
                self._reject(peer_id, sequence_id, incarnation, InvalidRequest(f"malformed command: {error!r}"))

    def _apply(self, peer_id: str, command: DrafterCommand) -> None:
        """Carries out one command, but for the computing.

        Raises:
            InvalidRequest: it can never be carried out.
            Overloaded, Unavailable: it may be, under a new incarnation.
        """
        sequence = self._cache.get(peer_id, command.sequence_id)
        is_current = sequence is not None and sequence.incarnation == command.incarnation
        if isinstance(command, OpenSequence):
            check_open(command)
            if sequence is not None:
                if sequence.incarnation >= command.incarnation:
                    raise InvalidRequest(f"incarnation {sequence.incarnation} is open already", field="incarnation")
                self._forget(sequence)
            self._cache.open(peer_id, command, self._clock())
        elif isinstance(command, CloseSequence):
            if sequence is not None and is_current:
                self._forget(sequence)
        elif sequence is None or not is_current:
            raise Unavailable(f"incarnation {command.incarnation} of this sequence is not open here")
        else:
            self._extend(sequence, command)

    def _extend(self, sequence: DraftSequence, command: ExtendSequence) -> None:
        check_extend(command, self._info, sequence.num_received, len(sequence.tail))
        self._cache.touch(sequence, self._clock())
        num_kept = sequence.num_received + len(command.token_ids) + (command.num_unverified or 0)
        self._cache.make_room(sequence, num_kept + command.block_length)
        self._model.receive(sequence, command)
        self._arrived.setdefault(sequence, []).append(command)
        self._rounds.pop(sequence, None)  # an earlier round that has not been drafted yet is out of date
        if command.next_token_id is not None:
            self._rounds[sequence] = command

    def _forget(self, sequence: DraftSequence) -> None:
        attributes = {"request_id": sequence.sequence_id, "num_positions": sequence.num_received}
        _requests.info("sequence closed", extra=attributes)
        self._cache.drop(sequence.peer_id, sequence.sequence_id)
        self._arrived.pop(sequence, None)
        self._rounds.pop(sequence, None)
        self._blocks.pop(sequence, None)
        self._ahead.take(sequence)

    # -------------------------------------------------------------- computing

    def _take_in(self) -> None:
        for sequence in self._model.take_in(self._arrived, self._rounds.keys()):
            self._give_up(sequence, InvalidRequest("representations are not finite", field="representations"))
        num_positions = sum(len(c.token_ids) for commands in self._arrived.values() for c in commands)
        self.metrics.verified_positions.inc(num_positions)

    def _draft(self, started_at_s: float) -> None:
        blocks = self._model.draft(self._rounds)
        elapsed = self._clock() - started_at_s
        for sequence, command in self._rounds.items():
            self._answer(sequence, command, tuple(blocks.get(sequence, ())), started_at_s, elapsed)

    def _answer(
        self,
        sequence: DraftSequence,
        command: ExtendSequence,
        drafts: tuple[int, ...],
        started_at_s: float,
        elapsed_s: float,
    ) -> None:
        block = DraftBlock(sequence.sequence_id, sequence.incarnation, command.round, drafts, elapsed_s)
        self._peers[sequence.peer_id].events.append(block)
        if drafts and command.next_token_id is not None:
            if self._may_draft_ahead and command.is_of_fixed_length:
                self._blocks[sequence] = (command.next_token_id, *drafts)
            self.metrics.blocks.inc()
            self.metrics.draft_tokens.inc(len(drafts))
        if (round_ := TraceContext.parse(command.traceparent)) is not None:
            attributes = {"num_draft_tokens": len(drafts), "num_sequences": len(self._rounds)}
            self._spans(Span("draft", round_.child(), round_, started_at_s, started_at_s + elapsed_s, attributes))

    def _answer_from_ahead(self, started_at_s: float) -> None:
        """Rounds whose blocks are there already, as long as they are asked for, go out before anything is computed."""
        for sequence, commands in self._arrived.items():
            ahead = self._ahead.take(sequence)  # in any case: its places are about to be written
            command = self._rounds.get(sequence)
            if ahead is None or command is None or command.next_token_id is None or not command.is_of_fixed_length:
                continue
            token_ids = [token_id for each in commands for token_id in each.token_ids]
            drafts = ahead.drafts_after(commands[0].start_position, token_ids, command.next_token_id) or ()
            is_hit = len(drafts) >= command.block_length
            (self.metrics.ahead_hits if is_hit else self.metrics.ahead_misses).inc()
            if is_hit:
                del self._rounds[sequence]
                elapsed = self._clock() - started_at_s
                self._answer(sequence, command, drafts[: command.block_length], started_at_s, elapsed)
        if self._blocks:
            self._deliver()

    def _begin_ahead(self) -> None:
        """Notes what may be drafted ahead, once this step has nothing else to write."""
        blocks, self._blocks = self._blocks, {}
        for sequence, (opening_token_id, *drafts) in blocks.items():
            block = self._model.open_block(sequence, opening_token_id, drafts)
            if block is None:
                continue
            try:
                if self._cache.spare_room(sequence, block.num_positions):
                    self._ahead.begin(sequence, block)
            except Exception:  # the budget was set higher than the memory there is; nobody is owed this
                _log.exception("no memory to draft ahead in")

    # -------------------------------------------------------------- answers

    def _deliver(self) -> bool:
        """Hands each peer what this step has for it. A peer whose stream fails loses its sequences."""
        has_events = False
        for peer_id, peer in list(self._peers.items()):
            if peer.num_credit_bytes:
                peer.events.append(CreditGranted(peer.num_credit_bytes))
                peer.num_credit_bytes = 0
            if peer.events:
                events, peer.events = peer.events, []
                has_events = True
                try:
                    peer.deliver(events)
                except Exception:
                    _log.exception("peer %s takes no more events; disconnecting it", peer_id)
                    self._disconnect(peer_id)
        return has_events

    def _reject(self, peer_id: str, sequence_id: str, incarnation: int, error: TandemError) -> None:
        """Says that a life of a sequence is over, and makes it so."""
        sequence = self._cache.get(peer_id, sequence_id) if isinstance(sequence_id, str) else None
        if sequence is not None and sequence.incarnation == incarnation:
            self._forget(sequence)
        retryable = isinstance(error, Overloaded | Unavailable)
        if (peer := self._peers.get(peer_id)) is not None:
            peer.events.append(SequenceRejected(sequence_id, incarnation, str(error), retryable))
        self.metrics.rejections[retryable].inc()

    def _give_up(self, sequence: DraftSequence, error: TandemError) -> None:
        self._reject(sequence.peer_id, sequence.sequence_id, sequence.incarnation, error)

    def _on_evict(self, sequence: DraftSequence, why: str) -> None:
        self._ahead.take(sequence)
        self._give_up(sequence, Overloaded(why))
