"""Tensors to and from the wire: bf16, f32, or int8 with one scale a row (the last dimension)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tandem_serve.errors import InvalidRequest
from tandem_serve.rpc._gen.tandem.v1 import tensor_pb2

WireDtype = Literal["bf16", "int8", "f32"]

DATA_TYPES: dict[WireDtype, tensor_pb2.DataType] = {
    "bf16": tensor_pb2.DATA_TYPE_BF16,
    "int8": tensor_pb2.DATA_TYPE_INT8,
    "f32": tensor_pb2.DATA_TYPE_F32,
}
WIRE_DTYPES: dict[int, WireDtype] = {number: name for name, number in DATA_TYPES.items()}
ELEMENT_BYTES: dict[WireDtype, int] = {"bf16": 2, "int8": 1, "f32": 4}
_TORCH_DTYPES: dict[WireDtype, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8, "f32": torch.float32}


def encode_tensor(tensor: Tensor, dtype: WireDtype, out: tensor_pb2.Tensor) -> None:
    """Writes a CPU tensor of any floating dtype into a message. bf16 rounds; int8 is off by at most half a scale."""
    out.dtype = DATA_TYPES[dtype]
    out.shape.extend(tensor.shape)
    if dtype == "int8":
        tensor, scales = _quantize(tensor)
        out.scales = _bytes(scales)
    out.data = _bytes(tensor.to(_TORCH_DTYPES[dtype]))


def decode_tensor(message: tensor_pb2.Tensor, dtype: WireDtype, shape: Sequence[int], field: str) -> Tensor:
    """The tensor of a message: [*shape] in bfloat16 for bf16, else in float32. Never NaN or infinite.

    Args:
        message: what arrived.
        dtype: the type agreed on.
        shape: the only shape that is right here.
        field: the message's path, for errors.

    Raises:
        InvalidRequest: naming the part of the message that is not as agreed.
    """
    if message.dtype != DATA_TYPES[dtype]:
        found = WIRE_DTYPES.get(message.dtype, str(message.dtype))
        raise InvalidRequest(f"{field}.dtype is {found}, agreed on was {dtype}", field=f"{field}.dtype")
    if list(message.shape) != list(shape):
        raise InvalidRequest(
            f"{field}.shape is {list(message.shape)[:8]}, needed {list(shape)}", field=f"{field}.shape"
        )
    count = math.prod(shape)
    data = _buffer(message.data, count * ELEMENT_BYTES[dtype], f"{field}.data")
    tensor = torch.frombuffer(data, dtype=_TORCH_DTYPES[dtype]).view(*shape) if count else torch.empty(*shape)
    if dtype == "int8":
        rows = count // shape[-1] if count else 0
        scales = _buffer(message.scales, rows * 4, f"{field}.scales")
        if rows:
            tensor = tensor.float() * torch.frombuffer(scales, dtype=torch.float32).view(*shape[:-1], 1)
    # One NaN in a shared KV cache can reach its neighbours (0 * NaN), so it stops here. The sum is the cheapest test.
    if not math.isfinite(tensor.sum(dtype=torch.float32).item()):
        raise InvalidRequest(f"{field} holds values that are not finite", field=field)
    return tensor


def _quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    rows = tensor.float()
    scales = rows.abs().amax(-1, keepdim=True) / 127.0
    return (rows / scales.clamp_min(torch.finfo(torch.float32).tiny)).round(), scales


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _buffer(data: bytes, num_bytes: int, field: str) -> bytearray:
    """Writable, as torch wants it: one memcpy, and the message may go."""
    if len(data) != num_bytes:
        raise InvalidRequest(f"{field} has {len(data)} bytes, the shape needs {num_bytes}", field=field)
    return bytearray(data)
