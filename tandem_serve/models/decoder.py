"""One decoder for the Llama family: primary, plain drafter and the tandem drafter's own layers.

The decoder knows neither cache nor batch layout: it hands q, k and v of each layer to an `Attend`, which stores the
keys and values, chooses what each query sees, and returns the mixture. Serving gives it flat ragged tokens [N] and a
paged cache; training [B, T] and `causal_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, Self, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem_serve.models.config import DecoderConfig
from tandem_serve.models.norm import RmsNorm
from tandem_serve.models.packed import Packed, add_product, can_pack, pack, product
from tandem_serve.models.rope import rope_table, rotate

__all__ = ["Attend", "Decoder", "DecoderConfig", "DecoderOutput", "Rotation", "causal_attention", "masked_attention"]

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


class LayerWeights(TypedDict):
    """One layer's parameters: a view of the module's own dictionary, because nn.Module's attribute lookups would cost
    a small model a tenth of its step.

    Matrices are [in, out], the transpose of nn.Linear's: float32 GEMM on a CPU is up to twice as fast that way for 1 to
    16 rows (384 -> 2048, 6 rows: 293 us -> 168 us), and no slower anywhere else.
    """

    attention_norm: Tensor  # [d]
    qkv: Tensor  # [d, (H + 2 * Hkv) * D]: columns of q, then k, then v
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    output: Tensor  # [H * D, d]
    output_bias: Tensor | None
    mlp_norm: Tensor  # [d]
    gate_up: Tensor  # [d, 2 * F]: columns of gate, then up
    down: Tensor  # [F, d]
    kv: NotRequired[Tensor]  # qkv's columns of k, then v: where matrices are packed, they cannot be cut out later


_MATRICES: tuple[Literal["qkv", "output", "gate_up", "down"], ...] = ("qkv", "output", "gate_up", "down")


class _Layer(nn.Module):
    """Holds one layer's parameters under their names; Decoder.run_layers computes with them."""

    def __init__(self, c: DecoderConfig, **factory: Any) -> None:
        super().__init__()
        attended, every = c.num_heads * c.head_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        shapes: dict[str, tuple[int, ...] | None] = {
            "attention_norm": (c.hidden_size,),
            "qkv": (c.hidden_size, every),
            "qkv_bias": (every,) if c.attention_bias else None,
            "q_norm": (c.head_dim,) if c.qk_norm else None,
            "k_norm": (c.head_dim,) if c.qk_norm else None,
            "output": (attended, c.hidden_size),
            "output_bias": (c.hidden_size,) if c.output_bias else None,
            "mlp_norm": (c.hidden_size,),
            "gate_up": (c.hidden_size, 2 * c.intermediate_size),
            "down": (c.intermediate_size, c.hidden_size),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **factory)))

    def weights(self) -> LayerWeights:
        return cast(LayerWeights, self._parameters)


class Decoder(nn.Module):
    """Embedding, L layers (RMSNorm, RoPE, GQA, SwiGLU), final norm, output head.

    Built with uninitialised weights: call `init_weights`, or load a checkpoint over them. Shape letters: d hidden size,
    H heads, Hkv key/value heads, D head_dim, F intermediate size, V vocabulary, "..." any leading shape ([N] tokens in
    serving, [B, T] in training).
    """

    rope: Tensor  # [positions, 2 * D], see rope_table; no buffer, because no cast may touch it

    def __init__(
        self, config: DecoderConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        c = self.config = config
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embedding = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size, **factory))
        self.layers = nn.ModuleList(_Layer(c, **factory) for _ in range(c.num_layers))
        self.norm = nn.Parameter(torch.empty(c.hidden_size, **factory))
        self.head = None if c.tie_word_embeddings else nn.Parameter(torch.empty(c.hidden_size, c.vocab_size, **factory))
        self._normalise = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self._normalise_head = RmsNorm(c.head_dim, c.rms_norm_eps)
        self._qk_v = (c.num_heads + c.num_kv_heads, c.num_kv_heads)
        self._q_k = (c.num_heads, c.num_kv_heads)
        self._gate_up = (c.intermediate_size, c.intermediate_size)
        self.layer_weights: list[LayerWeights] = [x.weights() for x in self.layers if isinstance(x, _Layer)]
        self._packed_head: Packed | Tensor | None = None
        self._build_rope()

    def _build_rope(self) -> None:
        c = self.config
        table = rope_table(c.rope, c.head_dim, 0 if self.norm.is_meta else c.max_position_embeddings)
        self.rope = table.to(self.norm.device, self.norm.dtype)

    def pack(self) -> Self:
        """Lays the matrices out for inference on a CPU (packed.py), in place; elsewhere it does nothing.

        Their parameters are gone afterwards: a packed decoder can neither be trained, saved, copied nor moved.
        """
        if self._packed_head is None and can_pack(self.norm):
            self._packed_head = pack(self.embedding.t() if self.head is None else self.head)
            self.head = None
            self.layer_weights = [self._packed(w) for w in self.layer_weights]
            for layer in self.layers:
                layer._parameters.update(dict.fromkeys(_MATRICES))
        return self

    def _packed(self, w: LayerWeights) -> LayerWeights:
        first_key = self.config.num_heads * self.config.head_dim
        matrices = {name: pack(w[name]) for name in _MATRICES}  # Packed, which the products below take for a Tensor
        return cast(LayerWeights, {**w, **matrices, "kv": pack(w["qkv"][:, first_key:])})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._packed_head is not None:
            raise RuntimeError("a packed decoder cannot be moved or cast: load it again")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build_rope()  # afresh: rounded to bf16 and back it would lose positions
        return self

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
        return torch.embedding(self.embedding, token_ids)

    def rotation(self, positions: Tensor) -> Rotation:
        """RoPE's cos and sin of positions [...], gathered once and shared by all layers."""
        cos_sin = torch.embedding(self.rope, positions).view(*positions.shape, 2, 1, self.config.head_dim)
        return Rotation(*cos_sin.unbind(-3))

    def run_layers(
        self,
        x: Tensor,  # [..., d]
        positions: Tensor,  # [...] int64
        attend: Attend,
        taps: Sequence[int] = (),
    ) -> DecoderOutput:
        """All layers and the final norm. Tap j is layer j's raw output: 0 the input x, L the last before the norm."""
        normalise, by_head = self._normalise, (*x.shape[:-1], -1, self.config.head_dim)
        cos, sin = self.rotation(positions)
        states = {}
        for index, w in enumerate(self.layer_weights):
            if index in taps:
                states[index] = x
            qkv = product(normalise(x, w["attention_norm"]), w["qkv"])
            if w["qkv_bias"] is not None:
                qkv = qkv + w["qkv_bias"]
            if cos.dtype is not qkv.dtype:  # autocast
                cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
            qk, v = qkv.view(by_head).split_with_sizes(self._qk_v, -2)
            if w["q_norm"] is not None and w["k_norm"] is not None:
                qk = self._normalise_heads(qk, w["q_norm"], w["k_norm"])
            q, k = rotate(qk, cos, sin).split_with_sizes(self._q_k, -2)
            x = add_product(x, attend(index, q, k, v), w["output"])
            if w["output_bias"] is not None:
                x = x + w["output_bias"]
            gate, up = product(normalise(x, w["mlp_norm"]), w["gate_up"]).split_with_sizes(self._gate_up, -1)
            x = add_product(x, F.silu(gate) * up, w["down"])
        states[len(self.layer_weights)] = x
        return DecoderOutput(normalise(x, self.norm), [states[tap] for tap in taps])

    def _normalise_heads(self, qk: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        """Qwen3: every head of q and k [..., H + Hkv, D] has its own RMSNorm before it is rotated."""
        q, k = qk.split_with_sizes(self._q_k, -2)
        return torch.cat((self._normalise_head(q, q_norm), self._normalise_head(k, k_norm)), -2)

    def keys_values(self, index: int, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What layer `index` would cache for an input x [..., d]: k and v [..., Hkv, D], k rotated."""
        w, first = self.layer_weights[index], self.config.num_heads * self.config.head_dim
        kv = product(self._normalise(x, w["attention_norm"]), w["kv"] if "kv" in w else w["qkv"][:, first:])
        if w["qkv_bias"] is not None:
            kv = kv + w["qkv_bias"][first:]
        k, v = kv.view(*kv.shape[:-1], -1, self.config.head_dim).chunk(2, -2)
        if w["k_norm"] is not None:
            k = self._normalise_head(k, w["k_norm"])
        return rotate(k, rotation.cos.to(k.dtype), rotation.sin.to(k.dtype)), v

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] after the final norm -> [..., V]."""
        if self._packed_head is not None:
            return product(hidden, self._packed_head)
        return F.linear(hidden, self.embedding) if self.head is None else hidden @ self.head

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, taps: Sequence[int] = ()) -> DecoderOutput:
        """Token ids and positions [...] to hidden states and taps. Call `logits` on the rows you need."""
        return self.run_layers(self.embed(token_ids), positions, attend, taps)

    __call__ = forward  # typed, and without nn.Module's hooks, whose check costs a small model's step 15 us


def causal_attention(config: DecoderConfig, num_tokens: int, device: torch.device | str = "cpu") -> Attend:
    """An Attend over whole sequences [B, T] from position 0, without a cache: training and evaluation."""
    masks: dict[int | None, Tensor] = {}  # of the windows that hide anything
    for window in set(config.sliding_windows):
        if window is not None and num_tokens > window:  # only then is there anything as large as [T, T]
            age = torch.arange(num_tokens, device=device)[:, None] - torch.arange(num_tokens, device=device)
            masks[window] = (age >= 0) & (age < window)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = masks.get(config.sliding_windows[index])
        if mask is None and q.is_cpu and torch.compiler.is_compiling():
            return attention_by_chunks(q, k, v)
        return masked_attention(q, k, v, mask)

    return attend


_QUERIES_PER_CHUNK = 128


def attention_by_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as plain products of [chunk, keys so far], for a compiler that fuses what lies between them.

    On a CPU in bfloat16, forward and backward, 2.6 times as fast as torch's flash kernel ([16, 512, 6, 64]: 43 ms
    against 112), which does not use the matrix products that oneDNN has for bfloat16.
    """
    groups = q.shape[-2] // k.shape[-2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mixed = []
    for start in range(0, q.shape[2], _QUERIES_PER_CHUNK):
        end = min(start + _QUERIES_PER_CHUNK, q.shape[2])
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2) * q.shape[-1] ** -0.5
        hidden = torch.arange(start, end, device=q.device)[:, None] < torch.arange(end, device=q.device)
        weights = scores.float().masked_fill(hidden, -torch.inf).softmax(-1)
        mixed.append(weights.to(v.dtype) @ v[:, :, :end])
    return torch.cat(mixed, 2).transpose(1, 2).flatten(-2)


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
