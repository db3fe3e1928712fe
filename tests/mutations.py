"""Malformed messages made from valid ones, as hypothesis strategies: fields set to something odd, bytes shuffled."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_UNSIGNED = [0, 1, 2, 7, 99, 100, 101, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
_SIGNED = [*_UNSIGNED[:-2], -1, -(1 << 31)]
_FLOATS = [0.0, -0.0, -1.0, 0.5, 1.0, 2.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
_STRINGS = ["", "a", "\0", "ünï", "x" * 128, "x" * 129, "y" * 5000]
_VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from(_SIGNED),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from([*_SIGNED, (1 << 63) - 1, -(1 << 63)]),
    FieldDescriptor.CPPTYPE_UINT32: st.sampled_from(_UNSIGNED),
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from([*_UNSIGNED, (1 << 64) - 1]),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from(_FLOATS),
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from(_FLOATS[:6] + _FLOATS[8:]),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from([0, 1, 2, 3, 4, 99, -1]),
}


@st.composite
def mutated(draw: st.DrawFn, valid: Message) -> bytes:
    """A message's bytes after one to three changes, at any depth; one in four is then changed byte by byte, too."""
    message = type(valid)()
    message.CopyFrom(valid)
    for _ in range(draw(st.integers(1, 3))):
        target = draw(st.sampled_from(_within(message)))
        _change(draw, target, draw(st.sampled_from(list(target.DESCRIPTOR.fields))))
    data = message.SerializeToString()
    return _shuffled(draw, data) if draw(st.integers(0, 3)) == 3 else data


def _within(message: Message) -> list[Message]:
    """The message and all that are set inside it."""
    found = [message]
    for field, value in message.ListFields():
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                found.extend(_within(part))
    return found


def _change(draw: st.DrawFn, message: Message, field: FieldDescriptor) -> None:
    value: Any = getattr(message, field.name)
    if draw(st.integers(0, 4)) == 4:
        message.ClearField(field.name)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if not field.is_repeated:
            value.SetInParent()
        elif value:
            value.extend([draw(st.sampled_from(list(value)))] * draw(st.sampled_from([1, 10])))
        else:
            value.add()
    elif field.is_repeated:
        if value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(_values(field))
        else:
            value.extend([draw(_values(field))] * draw(st.sampled_from([1, 3, 1000])))
    else:
        setattr(message, field.name, draw(_values(field)))


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(_STRINGS)
    return _VALUES[field.cpp_type]


def _shuffled(draw: st.DrawFn, data: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        span = draw(st.integers(0, 8))
        kind = draw(st.sampled_from(["overwrite", "insert", "delete", "repeat", "cut"]))
        if kind == "overwrite":
            data = data[:at] + draw(st.binary(min_size=span, max_size=span)) + data[at + span :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + span :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + span] * 3 + data[at + span :]
        else:
            data = data[:at]
    return data
