"""What a primary has measured of its rounds, and how long its router wants blocks, to and from control.proto."""

from __future__ import annotations

from collections.abc import Iterable

from tandem_serve.errors import InvalidRequest
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import control_pb2
from tandem_serve.types import MAX_BLOCK_LENGTH, BlockLengths, CostPoint, DraftingCosts

MAX_ENTRIES = 4096
_MAX_VALUE = 1e12


def direct_drafting_request(lengths: BlockLengths | None) -> control_pb2.DirectDraftingRequest:
    return control_pb2.DirectDraftingRequest(lengths=_lengths_message(lengths))


def parse_direct_drafting_request(message: control_pb2.DirectDraftingRequest) -> BlockLengths | None:
    """Raises InvalidRequest."""
    return _lengths(message.lengths, "lengths") if message.HasField("lengths") else None


def direct_drafting_response(costs: DraftingCosts | None) -> control_pb2.DirectDraftingResponse:
    if costs is None:
        return control_pb2.DirectDraftingResponse()
    return control_pb2.DirectDraftingResponse(
        costs=control_pb2.DraftingCosts(
            verify=_messages(costs.verify),
            draft=_messages(costs.draft),
            tried=costs.tried,
            right=costs.right,
            lengths=_lengths_message(costs.lengths),
        )
    )


def parse_direct_drafting_response(message: control_pb2.DirectDraftingResponse) -> DraftingCosts | None:
    """Raises InvalidRequest."""
    if not message.HasField("costs"):
        return None
    costs = message.costs
    return DraftingCosts(
        verify=_points(costs.verify, "costs.verify"),
        draft=_points(costs.draft, "costs.draft"),
        tried=_numbers(costs.tried, "costs.tried"),
        right=_numbers(costs.right, "costs.right"),
        lengths=_lengths(costs.lengths, "costs.lengths") if costs.lengths.by_batch else None,
    )


def _lengths_message(lengths: BlockLengths | None) -> control_pb2.BlockLengths | None:
    if lengths is None:
        return None
    return control_pb2.BlockLengths(by_batch=lengths.by_batch, probe_every=lengths.probe_every)


def _lengths(message: control_pb2.BlockLengths, field: str) -> BlockLengths:
    if len(message.probe_every) != len(message.by_batch):
        raise InvalidRequest("probe_every needs an entry for each of by_batch", field=f"{field}.probe_every")
    fields.integer(len(message.by_batch), f"{field}.by_batch", high=MAX_ENTRIES)
    for length in message.by_batch:
        fields.integer(length, f"{field}.by_batch", high=MAX_BLOCK_LENGTH)
    return BlockLengths(tuple(message.by_batch), tuple(message.probe_every))


def _messages(points: Iterable[CostPoint]) -> list[control_pb2.CostPoint]:
    return [control_pb2.CostPoint(size=each.size, seconds=each.seconds, weight=each.weight) for each in points]


def _points(messages: Iterable[control_pb2.CostPoint], field: str) -> tuple[CostPoint, ...]:
    return tuple(CostPoint(*_numbers((each.size, each.seconds, each.weight), field)) for each in messages)


def _numbers(values: Iterable[float], field: str) -> tuple[float, ...]:
    return tuple(fields.real(value, field, low=0, high=_MAX_VALUE) for value in values)
