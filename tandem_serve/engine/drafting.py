"""The primary's side of drafting: what each drafter is told, what it answered, and who goes on without it.

A sequence waits for a drafter only in a *round*: from the extend that carries its next token until the block is there
or the deadline passes. Everything else (no drafter, late drafter, no credit) means that it goes on alone, and each
round that it does is counted by cause.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Protocol

from torch import Tensor

from tandem_serve.decoding.block_policy import BlockPlan, BlockPolicy
from tandem_serve.engine.drafter_links import PROBE_INTERVAL_S, DrafterLinks, DrafterPeer
from tandem_serve.engine.outbox import Outbox
from tandem_serve.engine.representation_log import RepresentationMemory
from tandem_serve.engine.sequence import Attachment, Sequence, Speculation
from tandem_serve.interfaces import LinkState
from tandem_serve.metrics import PrimaryMetrics, WithoutDraft
from tandem_serve.types import (
    CloseSequence,
    CreditGranted,
    DecodingMode,
    DraftBlock,
    DrafterInfo,
    DraftEvent,
    ExtendSequence,
    OpenSequence,
    PrimaryInfo,
    SequenceRejected,
    credit_cost_bytes,
)

_log = logging.getLogger(__name__)

COOLDOWN_ROUNDS = 8  # after a missed deadline; doubles with each further miss
MAX_COOLDOWN_ROUNDS = 64
MIN_MOVE_TOKENS = 32  # that a sequence may still have, for another drafter to be shown all of it
MAX_REJECTIONS = 3  # retryable ones without a block in between, before a sequence stops trying
REJECTION_COOLDOWN_ROUNDS = 4  # so that two sequences do not take each other's place at a full drafter all the time
MAX_EXTEND_BYTES = 4 << 20  # of one sequence in one message: a long log goes out over several steps
_EMPTY_EXTEND_BYTES = credit_cost_bytes(ExtendSequence("", 0, 0, 0, (), None, None, 0))


class DraftingLimits(Protocol):
    """What drafting needs of an engine's configuration (config.py says what each means)."""

    @property
    def max_num_batched_tokens(self) -> int: ...

    @property
    def representation_memory_bytes(self) -> int: ...

    @property
    def draft_timeout_s(self) -> float: ...

    @property
    def block_length(self) -> int: ...


class DraftCoordinator:
    """Attaches sequences to drafters and runs their rounds. Belongs to the engine's thread; never blocks.

    `taps`: what every sequence keeps, where the engine cannot choose anew for each; None: what some drafter reads.
    `worth_s`: how long so many drafts are worth waiting for with so many sequences running, where a request leaves the
    block length to the engine; at most draft_timeout_s, which None means.
    """

    def __init__(
        self,
        config: DraftingLimits,
        primary: PrimaryInfo,
        links: DrafterLinks,
        policy: BlockPolicy,
        metrics: PrimaryMetrics,
        taps: tuple[int, ...] | None = None,
        worth_s: Callable[[int, int], float] | None = None,
    ) -> None:
        self._taps = taps
        self._worth_s = worth_s
        self._config = config
        self._primary = primary
        self._links = links
        self._policy = policy
        self._metrics = metrics
        self.memory = RepresentationMemory(config.representation_memory_bytes)
        self._incarnations = itertools.count(1)  # of all sequences: a reused request id is a new life, too
        self._outbox = Outbox()

    # -------------------------------------------------------------- a sequence's life

    def begin(self, sequence: Sequence) -> None:
        """Decides at admission whether a sequence keeps representations, and of which layers."""
        request = sequence.request
        if request.block_length == 0 or request.mode is DecodingMode.PLAIN:
            return
        named = None if request.drafter_address is None else self._links.name(request.drafter_address)
        log = self.memory.new_log(self._links.taps() if self._taps is None else self._taps)
        sequence.speculation = Speculation(log, named, next_cooldown=COOLDOWN_ROUNDS)

    def record(self, sequence: Sequence, taps: tuple[int, ...], states: Tensor | None, num_positions: int) -> None:
        """Adds verified positions, states [>= num_positions, len(taps), d_L], to the sequence's log."""
        spec = sequence.speculation
        if spec is None:
            return
        chunk = None
        if spec.log.taps and states is not None:
            kept = states[:num_positions]
            # Memory of its own: a view would keep the whole step's states alive.
            chunk = kept.clone() if spec.log.taps == taps else kept[:, [taps.index(tap) for tap in spec.log.taps]]
        self.memory.append(spec.log, num_positions, chunk)

    def end(self, sequence: Sequence, cause: WithoutDraft = WithoutDraft.NOT_REQUESTED) -> None:
        """Stops drafting for a sequence, for good: it has finished, or goes on alone."""
        if (spec := sequence.speculation) is None:
            return
        sequence.speculation = None  # first what cannot fail; a link may
        sequence.why_alone = cause
        self.memory.release(spec.log)
        if (attachment := spec.attachment) is not None:
            if not _is_lost(attachment):
                self._close(sequence, attachment)
            self._links.leave(attachment.drafter)
        if spec.named is not None:
            self._links.unname(spec.named)

    def end_all(self, sequences: Iterable[Sequence]) -> None:
        """`end` for each after an unexpected error, in whatever state that has left them and the links."""
        self._outbox.discard()
        for sequence in sequences:
            try:
                self.end(sequence, WithoutDraft.LOST)
            except Exception:  # its own part is done by then, see `end`; the drafter forgets it once it is idle
                _log.exception("leaving the drafter of %s failed", sequence.request.request_id)

    # -------------------------------------------------------------- rounds

    def receive(self, sequences: Mapping[str, Sequence], now_s: float) -> None:
        """Takes in what drafters have sent, and lets go of drafters that have gone."""
        self._links.tend()
        self._links.share_with_newcomers()
        for drafter in list(self._links):
            for event in drafter.link.receive():
                drafter.next_probe_s = None  # it answers
                sequence = sequences.get(event.sequence_id) if not isinstance(event, CreditGranted) else None
                if sequence is not None:
                    self._take_in(sequence, drafter, event, now_s)
        for sequence in sequences.values():
            spec = sequence.speculation
            if spec is not None and spec.attachment is not None and _is_lost(spec.attachment):
                self._detach(sequence, spec, WithoutDraft.LOST)

    def is_ready(self, sequence: Sequence, now_s: float) -> bool:
        """Whether a decoding sequence may run: no round is under way, or its block is there, or is too late."""
        spec = sequence.speculation
        if spec is None or (attachment := spec.attachment) is None:
            return True
        return attachment.num_asked == 0 or attachment.drafts is not None or now_s >= attachment.deadline_s

    def peek_drafts(self, sequence: Sequence) -> tuple[int, ...]:
        """The drafts that take_drafts would give; the round goes on."""
        spec = sequence.speculation
        attachment = spec.attachment if spec is not None else None
        return () if attachment is None or attachment.drafts is None else attachment.drafts

    def num_asked(self, sequence: Sequence) -> int:
        """Drafts asked for in the round under way, whether they are there or not; 0 where there is none."""
        spec = sequence.speculation
        return 0 if spec is None or spec.attachment is None else spec.attachment.num_asked

    def expected_s(self, sequence: Sequence) -> float:
        """When the drafts of the round under way will be there if they take as long as the last ones."""
        spec = sequence.speculation
        attachment = spec.attachment if spec is not None else None
        return 0.0 if attachment is None else attachment.asked_at_s + attachment.draft_s

    def drop_round(self, sequence: Sequence) -> None:
        """The sequence has moved on without the round under way, through no fault of the drafter's."""
        spec = sequence.speculation
        if spec is not None and spec.attachment is not None:
            spec.attachment.num_asked, spec.attachment.drafts = 0, None

    def take_drafts(self, sequence: Sequence) -> tuple[int, ...]:
        """Ends the round of a sequence that runs: its drafts, or none, counted by cause."""
        spec = sequence.speculation
        cause = sequence.why_alone
        if spec is not None:
            attachment = spec.attachment
            spec.draft_s = None if attachment is None or attachment.drafts is None else attachment.draft_s
            if attachment is not None and attachment.drafts is not None:
                drafts, attachment.drafts, attachment.num_asked = attachment.drafts, None, 0
                spec.next_cooldown = COOLDOWN_ROUNDS
                if drafts:
                    return drafts
                cause = WithoutDraft.EMPTY
            elif attachment is not None and attachment.num_asked:
                attachment.num_asked = 0
                attachment.drafter.next_probe_s = attachment.deadline_s + PROBE_INTERVAL_S
                spec.cooldown_rounds = spec.next_cooldown
                spec.next_cooldown = min(2 * spec.next_cooldown, MAX_COOLDOWN_ROUNDS)
                cause = WithoutDraft.LATE
            elif spec.cooldown_rounds:
                spec.cooldown_rounds -= 1
                cause = WithoutDraft.COOLING_DOWN if attachment is not None else cause
        self._metrics.without_draft[cause].inc()
        if sequence.trace is not None:
            sequence.trace.why_alone = cause.value
        return ()

    def earliest_deadline_s(self, sequences: Iterable[Sequence]) -> float | None:
        """When the next round under way gives up; None where there is none."""
        rounds = (s.speculation.attachment for s in sequences if s.speculation is not None)
        return min((a.deadline_s for a in rounds if a is not None and a.num_asked and a.drafts is None), default=None)

    def _take_in(self, sequence: Sequence, drafter: DrafterPeer, event: DraftEvent, now_s: float) -> None:
        """One event, if it is meant for the sequence's present life and round; late and repeated ones are dropped."""
        spec = sequence.speculation
        attachment = spec.attachment if spec is not None else None
        if spec is None or attachment is None or attachment.drafter is not drafter:
            return
        if isinstance(event, DraftBlock) and event.incarnation == attachment.incarnation:
            if event.round == attachment.round and attachment.num_asked and attachment.drafts is None:
                attachment.drafts = self._valid_drafts(event, attachment.num_asked)
                spec.num_rejections = 0
                waited_s = now_s - attachment.asked_at_s
                self._metrics.draft_wait.observe(waited_s)
                self._metrics.round_trip.observe(max(waited_s - event.draft_time_s, 0.0))
                drafter.observe_wait(waited_s, now_s)
                self._metrics.draft_time.observe(event.draft_time_s)
                # A link that works on this very thread delivers at the time that it was asked.
                attachment.draft_s = max(now_s - attachment.asked_at_s, event.draft_time_s)
        elif isinstance(event, SequenceRejected) and event.incarnation == attachment.incarnation:
            _log.info("drafter %s rejected %s: %s", drafter.link.address, event.sequence_id, event.message)
            self._detach(sequence, spec, WithoutDraft.REJECTED)
            spec.num_rejections += 1
            spec.cooldown_rounds = REJECTION_COOLDOWN_ROUNDS
            if not event.retryable or spec.num_rejections > MAX_REJECTIONS:
                self.end(sequence, WithoutDraft.REJECTED)

    def _valid_drafts(self, block: DraftBlock, num_asked: int) -> tuple[int, ...]:
        """A drafter may send anything: keeps what was asked for, up to the first id that does not exist."""
        drafts = block.draft_token_ids[:num_asked]
        valid = itertools.takewhile(lambda token_id: 0 <= token_id < self._primary.vocab_size, drafts)
        return tuple(valid)

    def _close(self, sequence: Sequence, attachment: Attachment) -> None:
        """Has a drafter that is there forget the sequence."""
        if attachment.is_open:
            close = CloseSequence(sequence.request.request_id, attachment.incarnation)
            self._outbox.close_sequence(attachment.drafter, attachment.epoch, close)

    def _detach(self, sequence: Sequence, spec: Speculation, cause: WithoutDraft) -> None:
        """Leaves a drafter that does not know the sequence any more."""
        if spec.attachment is not None:
            self._links.leave(spec.attachment.drafter)
        spec.attachment = None
        spec.cooldown_rounds, spec.next_cooldown = 0, COOLDOWN_ROUNDS
        self.memory.mark_sent(spec.log, 0)
        sequence.why_alone = cause

    # -------------------------------------------------------------- sending

    def send(self, sequences: Collection[Sequence], now_s: float) -> bool:
        """Sends what there is to say, one message a drafter, as far as credit goes. True where anything went out."""
        self._outbox.add_closings()
        speaking = []
        for sequence in sequences:
            spec = sequence.speculation
            if spec is None or spec.cooldown_rounds:
                continue
            self._move_on(sequence, spec)
            attachment = spec.attachment or self._attach(sequence, spec, now_s)
            # Lost since `receive`: there may be another drafter behind the link by now, with other taps.
            if attachment is not None and not attachment.num_asked and not _is_lost(attachment):
                speaking.append((spec.log.num_unsent, sequence, spec, attachment))
        speaking.sort(key=itemgetter(0))  # a long catch-up must not use up the credit of short ones
        for _, sequence, spec, attachment in speaking:
            self._speak(sequence, spec, attachment, len(sequences), now_s)
        return self._outbox.flush()

    def _move_on(self, sequence: Sequence, spec: Speculation) -> None:
        """To a drafter that has come since, where its own has a surplus and there is enough left to be worth it."""
        attachment = spec.attachment
        if attachment is None or attachment.drafter.num_surplus == 0 or attachment.num_asked:
            return
        if spec.log.start > 0 or sequence.num_remaining < MIN_MOVE_TOKENS or _is_lost(attachment):
            return
        if sequence.num_unverified:  # in the middle of a standalone block
            return
        drafter = self._links.less_busy_than(attachment.drafter, lambda info: _fits(info, sequence, spec))
        if drafter is None:
            return
        self._close(sequence, attachment)
        self._detach(sequence, spec, WithoutDraft.NO_DRAFTER)
        self._attach_to(drafter, sequence, spec)

    def _attach(self, sequence: Sequence, spec: Speculation, now_s: float) -> Attachment | None:
        """Finds a drafter for a sequence that has none."""
        if spec.log.start > 0:
            self.end(sequence, WithoutDraft.EVICTED)
            return None
        preferred = sequence.request.drafter_address
        drafter = self._links.pick(preferred, lambda info: _fits(info, sequence, spec), now_s)
        if drafter is None:
            sequence.why_alone = WithoutDraft.NO_DRAFTER
            return None
        return self._attach_to(drafter, sequence, spec)

    def _attach_to(self, drafter: DrafterPeer, sequence: Sequence, spec: Speculation) -> Attachment | None:
        epoch, info = drafter.link.epoch, drafter.link.info  # in this order: whatever changes after is another epoch
        if info is None or not _fits(info, sequence, spec):
            return None
        drafter.num_attached += 1
        spec.attachment = Attachment(drafter, epoch, info, next(self._incarnations))
        return spec.attachment

    def _speak(
        self, sequence: Sequence, spec: Speculation, attachment: Attachment, num_running: int, now_s: float
    ) -> None:
        """Tells a drafter what it lacks of a sequence and, where that is everything, asks for a block."""
        info = attachment.info
        if spec.log.num_sent < spec.log.start:
            self.end(sequence, WithoutDraft.EVICTED)
            return
        plan = self._plan(sequence, num_running)
        block_length = min(plan.block_length, self._longest_block(sequence, info))
        if block_length <= 0:
            too_long = info.max_model_len < len(sequence.token_ids)
            sequence.why_alone = WithoutDraft.TOO_LONG if too_long else WithoutDraft.NOT_REQUESTED
            return
        sequence.why_alone = WithoutDraft.NO_CREDIT  # unless the block is asked for below
        message = self._outbox.message_to(attachment.drafter)
        request_id = sequence.request.request_id
        if not attachment.is_open:
            if not message.add(OpenSequence(request_id, attachment.incarnation, sequence.request.sampling)):
                return
            attachment.is_open = True
        num_bytes = min(message.num_bytes_left, MAX_EXTEND_BYTES) - _EMPTY_EXTEND_BYTES
        bytes_per_position = 4 + 2 * len(info.taps) * info.primary_hidden_size  # see credit_cost_bytes
        num_positions = min(spec.log.num_unsent, num_bytes // bytes_per_position)
        asks = not sequence.is_prefilling and num_positions == spec.log.num_unsent
        if num_bytes < 0 or not (num_positions or asks):
            return
        start, end = spec.log.num_sent, spec.log.num_sent + num_positions
        representations = spec.log.read(start, end, info.taps)
        attachment.round += 1
        message.add(
            ExtendSequence(
                sequence_id=request_id,
                incarnation=attachment.incarnation,
                round=attachment.round,
                start_position=start,
                token_ids=tuple(sequence.token_ids[start:end]),
                representations=representations,
                next_token_id=sequence.token_ids[-1] if asks else None,
                block_length=block_length if asks else 0,
                traceparent=str(sequence.trace.begin_round(now_s)) if asks and sequence.trace is not None else None,
                stopping=plan.stopping if asks else None,
                num_unverified=sequence.num_unverified if asks and sequence.is_standalone else None,
            )
        )
        self.memory.mark_sent(spec.log, end)
        if representations is not None:
            self._metrics.representation_bytes.inc(representations.nbytes)
        if asks:
            attachment.num_asked = block_length
            attachment.asked_at_s = now_s
            attachment.deadline_s = now_s + self._config.draft_timeout_s
            if self._worth_s is not None and sequence.request.block_length is None:
                attachment.deadline_s = min(attachment.deadline_s, now_s + self._worth_s(block_length, num_running))

    def block_length(self, sequence: Sequence) -> int:
        """How many drafts of a standalone sequence stand between two passes of the primary: the paper's gamma."""
        asked = sequence.request.block_length
        return self._config.block_length if asked is None else asked

    def _plan(self, sequence: Sequence, num_running: int) -> BlockPlan:
        if sequence.is_standalone:
            return BlockPlan(self.block_length(sequence) - sequence.num_unverified)
        return self._policy.plan(sequence.request, num_running)

    def _longest_block(self, sequence: Sequence, info: DrafterInfo) -> int:
        """Drafts that may be asked for: within the request's tokens, the drafter's length, and a step's tokens."""
        longest = min(info.max_block_length, info.max_model_len - len(sequence.token_ids) + 1)
        if sequence.is_standalone:
            return min(longest, sequence.num_remaining)
        return min(longest, sequence.num_remaining - 1, self._config.max_num_batched_tokens - 1)


def _fits(info: DrafterInfo, sequence: Sequence, spec: Speculation) -> bool:
    """Whether a drafter can be started on what is remembered of a sequence."""
    return spec.log.covers(info.taps) and info.max_model_len > len(sequence.token_ids)


def _is_lost(attachment: Attachment) -> bool:
    """Whether the drafter has gone, or come back without any memory."""
    link = attachment.drafter.link
    return link.state is not LinkState.READY or link.epoch != attachment.epoch
