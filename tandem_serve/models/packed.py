"""Weight matrices laid out for oneDNN: what a CPU's inference runs on.

torch sends a float32 product on a CPU to MKL, which is slow for the 2 to 16 rows of a verification where matrices are
large, and on processors of other makers than its own never uses AVX-512. oneDNN on weights that were reordered once is
as fast for one row, and up to twice as fast from a few on; bfloat16 gains as much. Its dispatch takes 10 us a product,
though: small matrices stay with MKL where that is at its best. (Figures: docs/lab-notes.md.)
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_HINT = 6  # the layout suits a block of five drafts best, and costs neither one row nor a prompt anything
_SMALL = 1 << 21  # elements: up to here a single row spends longer in oneDNN's dispatch than in MKL's product
_SMALL_FOR_MKL = 1 << 20  # and up to here a few rows do, too, where MKL uses all that the processor has


def can_pack(matrix: Tensor) -> bool:
    """Whether this machine and build of torch have the kernels, for this dtype."""
    is_here = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return is_here and matrix.is_cpu and (matrix.dtype is torch.float32 or _multiplies_bfloat16(matrix.dtype))


def _multiplies_bfloat16(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _is_intel() -> bool:
    """Whether MKL knows the processor as one of its maker's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


class Packed(NamedTuple):
    """A matrix [in, out] in oneDNN's layout; `plain` as it was, where it is the faster one for a single row."""

    packed: Tensor
    plain: Tensor | None


def pack(matrix: Tensor) -> Packed | Tensor:
    """A matrix [in, out] for `product` and `add_product`, as the machine multiplies it best; its columns keep their
    order.
    """
    matrix = matrix.detach()
    if matrix.dtype is torch.float32 and matrix.numel() <= _SMALL_FOR_MKL and _is_intel():
        return matrix.contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous(), _ROWS_HINT)
    keeps = matrix.dtype is torch.float32 and matrix.numel() <= _SMALL
    return Packed(packed, matrix.contiguous() if keeps else None)


def product(x: Tensor, matrix: Tensor | Packed) -> Tensor:
    """x [..., in] @ matrix [in, out]."""
    if isinstance(matrix, Tensor):
        return x @ matrix
    if matrix.plain is not None and x.numel() == matrix.plain.shape[0]:
        return x @ matrix.plain
    packed: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, matrix.packed, None, "none", [], "")
    return packed


def add_product(x: Tensor, a: Tensor, matrix: Tensor | Packed) -> Tensor:
    """x + a @ matrix, in one kernel where it can be. (Autocast would round x in addmm: [B, T, d] goes without.)"""
    if isinstance(matrix, Packed):
        if matrix.plain is None or a.numel() > matrix.plain.shape[0]:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a, x, matrix.packed, None, "add")
            return packed
        matrix = matrix.plain
    return torch.addmm(x, a, matrix) if x.dim() == 2 else x + a @ matrix
