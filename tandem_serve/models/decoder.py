"""One decoder for the Llama family: primary, plain drafter and the tandem drafter's own layers.

The decoder knows neither cache nor batch layout: it hands q, k and v of each layer to an `Attend`, which stores the
keys and values, chooses what each query sees, and returns the mixture. Serving gives it flat ragged tokens [N] and a
paged cache; training [B, T] and `causal_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem_serve.models.config import DecoderConfig
from tandem_serve.models.rope import rope_table, rotate

__all__ = ["Attend", "Decoder", "DecoderConfig", "DecoderOutput", "causal_attention", "rms_norm"]

# (layer index, q [..., H, D], k [..., Hkv, D], v [..., Hkv, D]), q and k rotated -> [..., H * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class DecoderOutput(NamedTuple):
    """hidden [..., d] after the final norm; taps raw [..., d] each, in the order asked for."""

    hidden: Tensor
    taps: list[Tensor]


class Rotation(NamedTuple):
    """cos and sin [..., 1, D] of some positions (rope_table's sign convention)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's parameters as plain attributes: what nn.Module's lookups cost is a tenth of a small model's step."""

    attention_norm: Tensor  # [d]
    qkv: Tensor  # [(H + 2 * Hkv) * D, d]: rows of q, then k, then v
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    output: Tensor  # [d, H * D]
    output_bias: Tensor | None
    mlp_norm: Tensor  # [d]
    gate_up: Tensor  # [2 * F, d]: rows of gate, then up
    down: Tensor  # [d, F]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 as in Hugging Face's models.

    On a CPU torch's own is eight small kernels; by way of the vector norm it is four (10 us -> 5 us a call).
    """
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.float()
    width = x.shape[-1]
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit = wide / torch.hypot(length, length.new_full((), math.sqrt(width * eps))) * math.sqrt(width)
    unit = unit.to(x.dtype)
    return unit if weight is None else unit * weight


class _Layer(nn.Module):
    """Holds one layer's parameters under their names; Decoder.run_layers computes with them."""

    def __init__(self, c: DecoderConfig, **factory: Any) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        heads, kv_heads, width = c.num_heads, c.num_kv_heads, c.head_dim
        self.attention_norm = parameter(c.hidden_size)
        self.qkv = parameter((heads + 2 * kv_heads) * width, c.hidden_size)
        self.qkv_bias = parameter((heads + 2 * kv_heads) * width) if c.attention_bias else None
        self.q_norm = parameter(width) if c.qk_norm else None
        self.k_norm = parameter(width) if c.qk_norm else None
        self.output = parameter(c.hidden_size, heads * width)
        self.output_bias = parameter(c.hidden_size) if c.output_bias else None
        self.mlp_norm = parameter(c.hidden_size)
        self.gate_up = parameter(2 * c.intermediate_size, c.hidden_size)
        self.down = parameter(c.hidden_size, c.intermediate_size)

    def weights(self) -> LayerWeights:
        return LayerWeights(**{name: getattr(self, name) for name in LayerWeights.__slots__})


class Decoder(nn.Module):
    """Embedding, L layers (RMSNorm, RoPE, GQA, SwiGLU), final norm, output head.

    Built with uninitialised weights: call `init_weights`, or load a checkpoint over them. Shape letters: d hidden size,
    H heads, Hkv key/value heads, D head_dim, V vocabulary, "..." any leading shape ([N] in serving, [B, T] in training).
    """

    rope: Tensor

    def __init__(
        self, config: DecoderConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))
        self.layers = nn.ModuleList(_Layer(config, **factory) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, **factory))
        self.head = (
            None
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))
        )
        self.register_buffer("rope", torch.empty(0, **factory), persistent=False)
        self._bind()

    def _bind(self) -> None:
        """Refreshes what is derived from the parameters: the plain weight records and the RoPE table in their dtype."""
        c = self.config
        self._weights = [layer.weights() for layer in self.layers if isinstance(layer, _Layer)]
        if not self.norm.is_meta:
            table = rope_table(c.rope, c.head_dim, c.max_position_embeddings, self.norm.device)
            self.rope = table.to(self.norm.dtype)
        self._heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        self._all_heads = sum(self._heads)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._bind()  # the table is computed afresh: rounding it to bf16 and back would lose positions
        return self

    @property
    def layer_weights(self) -> Sequence[LayerWeights]:
        """Each layer's parameters, the very tensors that it computes with."""
        return self._weights

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> Self:
        """Normal(0, std) weights, narrower where they feed the residual stream (GPT-2), unit norms, zero biases."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                narrow = name.endswith((".output", ".down"))
                parameter.normal_(0.0, residual_std if narrow else std, generator=generator)
        return self

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [...] int64 -> [..., d]."""
        return F.embedding(token_ids, self.embedding)

    def rotation(self, positions: Tensor) -> Rotation:
        """RoPE's cos and sin of positions [...], gathered once and shared by all layers."""
        cos, sin = F.embedding(positions, self.rope).unsqueeze(-2).chunk(2, -1)
        return Rotation(cos, sin)

    def run_layers(
        self,
        x: Tensor,  # [..., d]
        positions: Tensor,  # [...] int64
        attend: Attend,
        taps: Sequence[int] = (),
    ) -> DecoderOutput:
        """All layers and the final norm. Tap j is layer j's raw output: 0 the input x, L the last before the norm."""
        eps = self.config.rms_norm_eps
        cos, sin = self.rotation(positions)
        states = {}
        for index, w in enumerate(self._weights):
            if index in taps:
                states[index] = x
            qkv = F.linear(rms_norm(x, w.attention_norm, eps), w.qkv, w.qkv_bias)
            if cos.dtype is not qkv.dtype:  # autocast
                cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
            q, k, v = self._split_and_rotate(qkv, w, cos, sin)
            x = x + F.linear(attend(index, q, k, v), w.output, w.output_bias)
            gate, up = F.linear(rms_norm(x, w.mlp_norm, eps), w.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w.down)
        states[len(self._weights)] = x
        return DecoderOutput(rms_norm(x, self.norm, eps), [states[tap] for tap in taps])

    def _split_and_rotate(self, qkv: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """qkv [..., (H + 2 * Hkv) * D] -> q, k, v by head; q and k normalised (Qwen3) and rotated, together."""
        heads, kv_heads, _ = self._heads
        qkv = qkv.unflatten(-1, (self._all_heads, -1))
        qk, v = qkv.split((heads + kv_heads, kv_heads), -2)
        if w.q_norm is not None and w.k_norm is not None:
            eps = self.config.rms_norm_eps
            q, k = qk.split((heads, kv_heads), -2)
            qk = torch.cat((rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)), -2)
        q, k = rotate(qk, cos, sin).split((heads, kv_heads), -2)
        return q, k, v

    def keys_values(self, index: int, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What layer `index` would cache for an input x [..., d]: k and v [..., Hkv, D], k rotated."""
        c, w = self.config, self._weights[index]
        first = c.num_heads * c.head_dim
        bias = None if w.qkv_bias is None else w.qkv_bias[first:]
        kv = F.linear(rms_norm(x, w.attention_norm, c.rms_norm_eps), w.qkv[first:], bias)
        k, v = kv.unflatten(-1, (2 * c.num_kv_heads, -1)).chunk(2, -2)
        if w.k_norm is not None:
            k = rms_norm(k, w.k_norm, c.rms_norm_eps)
        return rotate(k, rotation.cos.to(k.dtype), rotation.sin.to(k.dtype)), v

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] after the final norm -> [..., V]."""
        return F.linear(hidden, self.embedding if self.head is None else self.head)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, taps: Sequence[int] = ()) -> DecoderOutput:
        """Token ids and positions [...] to hidden states and taps. Call `logits` on the rows you need."""
        return self.run_layers(self.embed(token_ids), positions, attend, taps)


def causal_attention(config: DecoderConfig, num_tokens: int, device: torch.device | str = "cpu") -> Attend:
    """An Attend over whole sequences [B, T] from position 0, without a cache: training and evaluation."""
    masks: dict[int | None, Tensor | None] = {None: None}
    age = torch.arange(num_tokens, device=device)[:, None] - torch.arange(num_tokens, device=device)
    for window in set(config.sliding_windows):
        if window is not None:
            masks[window] = None if num_tokens <= window else (age >= 0) & (age < window)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = masks[config.sliding_windows[index]]
        return masked_attention(q, k, v, mask)

    return attend


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, T, H, D], k and v [B, S, Hkv, D], mask [..., T, S] true where seen, None for causal -> [B, T, H * D]."""
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[-2] != k.shape[-2],
    )
    return mixed.transpose(1, 2).flatten(-2)
