"""Rotary position embeddings: the scaling variants of the Llama family, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tandem_serve.errors import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    """Base frequency and scaling, as in config.json. `scaling` holds rope_type and what that type reads."""

    theta: float = 10_000.0
    scaling: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default"})

    @property
    def rope_type(self) -> str:
        return str(self.scaling["rope_type"])

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older).

        Raises:
            CheckpointError: for a scaling type that we do not run, or one that lacks a parameter.
        """
        raw = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"config.json: rope parameters must be an object, not {raw!r}")
        given = dict(raw)
        theta = given.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0
        rope_type = str(given.pop("rope_type", None) or given.get("type") or "default")
        given.pop("type", None)
        if given.pop("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
            raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
        if rope_type not in _FREQUENCIES:
            raise CheckpointError(
                f"config.json: RoPE type {rope_type!r} is not supported; supported: {', '.join(_FREQUENCIES)}"
            )
        needed = _NEEDED[rope_type]
        if "original_max_position_embeddings" in needed:
            fallback = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
            given.setdefault("original_max_position_embeddings", fallback)
        scaling = {k: v for k, v in given.items() if v is not None and k in needed | _OPTIONAL[rope_type]}
        if missing := needed - scaling.keys():
            raise CheckpointError(f"config.json: RoPE type {rope_type!r} lacks {', '.join(sorted(missing))}")
        for name, value in {"rope_theta": theta, **scaling}.items():
            if not isinstance(value, (int, float)) or not 0 <= value <= _MAX_PARAMETER:  # refuses NaN too
                raise CheckpointError(f"config.json: RoPE parameter {name} = {value!r} is not a usable number")
            if value == 0 and name not in _MAY_BE_ZERO:
                raise CheckpointError(f"config.json: RoPE parameter {name} = 0 is out of range")
        if theta <= 1 or scaling.get("low_freq_factor", 0) >= scaling.get("high_freq_factor", math.inf):
            raise CheckpointError("config.json: RoPE parameter rope_theta or low_freq_factor is out of range")
        return cls(float(theta), {"rope_type": rope_type, **scaling})

    def to_hf(self) -> dict[str, Any]:
        """The older spelling, which every transformers version reads."""
        return {"rope_theta": self.theta, "rope_scaling": None if self.rope_type == "default" else dict(self.scaling)}


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """cos and sin for every position, [num_positions, 2 * head_dim] float32 on the CPU: D cosines, then D sines.

    The sines of the first half are negated, so that `rotate` needs no rotate_half. Positions beyond the table are the
    caller's mistake (an index error): a sequence never grows past max_position_embeddings.
    """
    inverse, factor = _FREQUENCIES[rope.rope_type](rope, head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos, -sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads x [..., H, D] by `rope_table`'s cos and sin [..., 1, D]: rotate_half's result in three kernels."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _default(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    return 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)), 1.0


def _linear(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    return _default(rope, head_dim)[0] / rope.scaling["factor"], 1.0


def _llama3(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the band between interpolated."""
    inverse, _ = _default(rope, head_dim)
    s = rope.scaling
    original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / s["factor"] + smooth * inverse, 1.0


def _yarn(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolates slow dimensions, keeps fast ones, and scales cos and sin."""
    s = rope.scaling
    factor, original = s["factor"], s["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(s.get("beta_fast", 32)), dimension(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    inverse, _ = _default(rope, head_dim)
    return inverse / factor * (1 - keep) + inverse * keep, _yarn_attention_factor(s)


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def magnitude(mscale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


# `dynamic` equals `default` up to max_position_embeddings, which is as far as we go: beyond it the frequencies would
# depend on how long the sequence is at the moment, and the text on how the prompt was cut into chunks.
_FREQUENCIES: Mapping[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "yarn": _yarn,
    "llama3": _llama3,
}
_NEEDED: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
_MAY_BE_ZERO = {"truncate", "mscale", "mscale_all_dim"}  # false, and "not given"
_MAX_PARAMETER = 1e12
_OPTIONAL: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "dynamic": frozenset({"original_max_position_embeddings"}),
    "yarn": frozenset({"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}),
    "llama3": frozenset(),
}
