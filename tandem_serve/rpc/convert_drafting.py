"""Commands and events of a drafting stream, to and from drafting.proto.

What is wrong with one sequence becomes a SequenceRejected; only what cannot be laid at one sequence's door raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_serve.errors import InvalidRequest
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2
from tandem_serve.rpc.convert_handshake import DrafterTerms
from tandem_serve.rpc.convert_primary import POLICIES, fill_sampling, parse_policy, parse_sampling
from tandem_serve.rpc.convert_tensor import ELEMENT_BYTES, WIRE_DTYPES, WireDtype, decode_tensor, encode_tensor
from tandem_serve.types import (
    MAX_BLOCK_LENGTH,
    CloseSequence,
    CreditGranted,
    DraftBlock,
    DrafterCommand,
    DraftEvent,
    ExtendSequence,
    OpenSequence,
    PolicyName,
    SequenceRejected,
    StoppingRule,
    credit_cost_bytes,
)

MAX_COMMANDS = 4096  # in a message
MAX_EVENTS = 65_536  # in a message
MAX_REJECTION_BYTES = 1024  # of a SequenceRejected's text

# ------------------------------------------------------------------ commands


def commands_request(commands: Sequence[DrafterCommand], dtype: WireDtype) -> drafting_pb2.DraftRequest:
    request = drafting_pb2.DraftRequest()
    request.commands.SetInParent()
    add = request.commands.commands.add
    for command in commands:
        if isinstance(command, ExtendSequence):
            _fill_extend(command, add().extend, dtype)
        elif isinstance(command, OpenSequence):
            opened = add().open
            opened.sequence_id, opened.incarnation = command.sequence_id, command.incarnation
            fill_sampling(command.sampling, opened.sampling)
        else:
            add().close.MergeFrom(
                drafting_pb2.CloseSequence(sequence_id=command.sequence_id, incarnation=command.incarnation)
            )
    return request


def _fill_extend(command: ExtendSequence, out: drafting_pb2.ExtendSequence, dtype: WireDtype) -> None:
    out.sequence_id, out.incarnation, out.round = command.sequence_id, command.incarnation, command.round
    out.start_position, out.block_length = command.start_position, command.block_length
    if command.num_unverified is not None:
        out.num_unverified = command.num_unverified
    out.token_ids.extend(command.token_ids)
    if command.next_token_id is not None:
        out.next_token_id = command.next_token_id
    if command.traceparent is not None:
        out.traceparent = command.traceparent
    if command.representations is not None and command.token_ids:
        encode_tensor(command.representations, dtype, out.representations)
    if (rule := command.stopping) is not None:
        out.stopping.policy = POLICIES[rule.policy]
        out.stopping.keep_threshold, out.stopping.step_cost = rule.keep_threshold, rule.step_cost
        if rule.threshold is not None:
            out.stopping.threshold = rule.threshold


@dataclass(frozen=True, slots=True)
class ParsedCommands:
    """One message's worth of work for the drafter."""

    commands: list[DrafterCommand]  # what is to be done, in order; a rejected sequence is closed
    rejections: list[SequenceRejected]
    cost_bytes: int  # what the primary has booked for the message (types.credit_cost_bytes)
    waste_bytes: int  # the part of it that the commands above do not account for: to be granted again at once


def parse_commands(message: drafting_pb2.DraftCommands, terms: DrafterTerms) -> ParsedCommands:
    """Checks every field against the drafter's own terms.

    Raises:
        InvalidRequest: too many commands, an unknown kind of command, or one without a usable sequence id.
    """
    fields.integer(len(message.commands), "the number of commands", high=MAX_COMMANDS)
    commands: list[DrafterCommand] = []
    rejections: list[SequenceRejected] = []
    cost = waste = 0
    for index, wrapped in enumerate(message.commands):
        field = f"commands[{index}]"
        kind = wrapped.WhichOneof("kind")
        if kind is None:
            raise InvalidRequest(f"{field} is of no known kind", field=field)
        body = wrapped.extend if kind == "extend" else wrapped.open if kind == "open" else wrapped.close
        sequence_id = fields.text(body.sequence_id, f"{field}.{kind}.sequence_id", max_bytes=fields.MAX_ID_BYTES)
        booked = _booked_bytes(body)
        command: DrafterCommand
        try:
            command = _parse_command(body, terms, f"{field}.{kind}")
        except InvalidRequest as error:
            command = CloseSequence(sequence_id, body.incarnation)
            text = str(error)[:MAX_REJECTION_BYTES]
            rejections.append(SequenceRejected(sequence_id, body.incarnation, text, retryable=False))
        commands.append(command)
        cost += booked
        waste += booked - credit_cost_bytes(command)
    return ParsedCommands(commands, rejections, cost, waste)


_Body = drafting_pb2.ExtendSequence | drafting_pb2.OpenSequence | drafting_pb2.CloseSequence


def _parse_command(body: _Body, terms: DrafterTerms, field: str) -> DrafterCommand:
    if isinstance(body, drafting_pb2.ExtendSequence):
        return _parse_extend(body, terms, field)
    if isinstance(body, drafting_pb2.OpenSequence):
        return OpenSequence(body.sequence_id, body.incarnation, parse_sampling(body.sampling, f"{field}.sampling"))
    return CloseSequence(body.sequence_id, body.incarnation)


def _parse_extend(body: drafting_pb2.ExtendSequence, terms: DrafterTerms, field: str) -> ExtendSequence:
    vocab_size, taps = terms.info.vocab_size, len(terms.info.taps)
    ids = fields.token_ids(body.token_ids, f"{field}.token_ids", vocab_size=vocab_size)
    has_tensor = body.HasField("representations")
    if has_tensor != bool(taps and ids):
        need = "missing" if taps and ids else "not wanted: the drafter has no taps, or there are no token_ids"
        raise InvalidRequest(f"{field}.representations are {need}", field=f"{field}.representations")
    shape = (len(ids), taps, terms.info.primary_hidden_size)
    next_token_id = None
    if body.HasField("next_token_id"):
        next_token_id = fields.integer(body.next_token_id, f"{field}.next_token_id", high=vocab_size - 1)
    return ExtendSequence(
        sequence_id=body.sequence_id,
        incarnation=body.incarnation,
        round=body.round,
        start_position=fields.integer(
            body.start_position, f"{field}.start_position", high=fields.MAX_POSITION - len(ids)
        ),
        token_ids=ids,
        representations=decode_tensor(
            body.representations, terms.representation_dtype, shape, f"{field}.representations"
        )
        if has_tensor
        else None,
        next_token_id=next_token_id,
        block_length=fields.integer(body.block_length, f"{field}.block_length", high=MAX_BLOCK_LENGTH),
        traceparent=fields.traceparent(body.traceparent),
        stopping=_parse_stopping(body.stopping, f"{field}.stopping.") if body.HasField("stopping") else None,
        num_unverified=fields.integer(body.num_unverified, f"{field}.num_unverified", high=fields.MAX_POSITION)
        if body.HasField("num_unverified")
        else None,
    )


def _parse_stopping(message: drafting_pb2.StoppingRule, field: str) -> StoppingRule:
    policy, threshold = parse_policy(message, field)
    if policy in (None, PolicyName.FIXED):
        raise InvalidRequest(f"{field}policy ends no block", field=f"{field}policy")
    keep_threshold = fields.real(message.keep_threshold, f"{field}keep_threshold", low=0, high=1)
    step_cost = fields.real(message.step_cost, f"{field}step_cost", low=0, high=1)
    return StoppingRule(policy, threshold, keep_threshold, step_cost)


def _booked_bytes(body: _Body) -> int:
    """types.credit_cost_bytes as the sender booked it, from the sizes that arrived: malformed ones count too."""
    if not isinstance(body, drafting_pb2.ExtendSequence):
        return 64
    values = 0
    if body.HasField("representations"):
        dtype = WIRE_DTYPES.get(body.representations.dtype)
        values = len(body.representations.data) // (ELEMENT_BYTES[dtype] if dtype else 1)
    return 64 + 4 * len(body.token_ids) + 2 * values


# ------------------------------------------------------------------ events


def events_response(events: Sequence[DraftEvent]) -> drafting_pb2.DraftResponse:
    response = drafting_pb2.DraftResponse()
    out = response.events
    out.SetInParent()
    for event in events:
        if isinstance(event, DraftBlock):
            out.blocks.add(
                sequence_id=event.sequence_id,
                incarnation=event.incarnation,
                round=event.round,
                draft_token_ids=event.draft_token_ids,
                draft_time_us=min(int(event.draft_time_s * 1e6), 0xFFFF_FFFF),
            )
        elif isinstance(event, SequenceRejected):
            out.rejections.add(
                sequence_id=event.sequence_id,
                incarnation=event.incarnation,
                message=event.message[:MAX_REJECTION_BYTES],
                retryable=event.retryable,
            )
        else:
            out.credit_granted_bytes += event.num_bytes
    return response


def parse_events(message: drafting_pb2.DraftEvents, vocab_size: int) -> list[DraftEvent]:
    """Raises InvalidRequest: a drafter that sends such a thing is not to be relied on."""
    fields.integer(len(message.blocks) + len(message.rejections), "the number of events", high=MAX_EVENTS)
    events: list[DraftEvent] = []
    for block in message.blocks:
        ids = fields.token_ids(block.draft_token_ids, "blocks.draft_token_ids", vocab_size=vocab_size)
        fields.integer(len(ids), "the number of draft_token_ids", high=MAX_BLOCK_LENGTH)
        events.append(DraftBlock(block.sequence_id, block.incarnation, block.round, ids, block.draft_time_us / 1e6))
    for rejection in message.rejections:
        events.append(
            SequenceRejected(
                rejection.sequence_id,
                rejection.incarnation,
                rejection.message[:MAX_REJECTION_BYTES],
                rejection.retryable,
            )
        )
    if message.credit_granted_bytes:
        events.append(CreditGranted(message.credit_granted_bytes))
    return events
