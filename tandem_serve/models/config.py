"""A decoder's shape, read from and written to a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_serve.errors import CheckpointError
from tandem_serve.models.folder import token_id_list
from tandem_serve.models.rope import RopeConfig

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers takes for a key that config.json leaves out. None: the number of attention heads.
_DEFAULT_KV_HEADS: Mapping[str, int | None] = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_POSITIONS: Mapping[str, int] = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
# Sizes past these are damage or an attack, not a model.
_LIMITS: Mapping[str, int] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 19,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 21,
}
_MAX_ROPE_ENTRIES = 1 << 28  # 2 GiB of float32 cosines and sines: 2 M positions of 128


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes a decoder's computation, and nothing else.

    attention_bias is the bias of q, k and v; output_bias that of o_proj (Llama and Qwen3 have both or neither, Qwen2
    only the first). sliding_windows holds one entry a layer: a query sees that many positions, its own included; None
    sees all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        if len(self.sliding_windows) != self.num_layers:
            raise CheckpointError(f"{len(self.sliding_windows)} sliding windows for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if self.head_dim * self.max_position_embeddings > _MAX_ROPE_ENTRIES:
            raise CheckpointError(f"a RoPE table of {self.max_position_embeddings} x {self.head_dim} is too large")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """Reads config.json.

        Raises:
            CheckpointError: naming the first thing that is missing, absurd, or that this decoder does not compute.
        """
        model_type = str(hf.get("model_type"))
        if model_type not in _ARCHITECTURES:
            raise CheckpointError(
                f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
            )
        _refuse_unsupported(hf)
        heads = _size(hf, "num_attention_heads")
        hidden = _size(hf, "hidden_size")
        head_dim = 128 if model_type == "qwen3" else hidden // heads
        layers = _size(hf, "num_hidden_layers")
        biased = bool(hf.get("attention_bias", False)) and model_type in ("llama", "qwen3")
        return cls(
            model_type=model_type,
            vocab_size=_size(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(hf, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_size(hf, "num_key_value_heads", _DEFAULT_KV_HEADS[model_type] or heads),
            head_dim=_size(hf, "head_dim", head_dim),
            rms_norm_eps=_epsilon(hf),
            rope=RopeConfig.from_hf(hf),
            max_position_embeddings=_size(hf, "max_position_embeddings", _DEFAULT_POSITIONS[model_type]),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=biased or model_type == "qwen2",
            output_bias=biased,
            qk_norm=model_type == "qwen3",
            sliding_windows=_sliding_windows(hf, model_type, layers),
            bos_token_id=next(iter(token_id_list(hf.get("bos_token_id"))), None),
            eos_token_ids=token_id_list(hf.get("eos_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json's contents; `from_hf` gives back an equal config, and transformers loads it."""
        hf: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            **self.rope.to_hf(),
        }
        if self.model_type in ("llama", "qwen3"):
            hf["attention_bias"] = self.output_bias
        windows = {w for w in self.sliding_windows if w is not None}
        if self.model_type == "mistral":
            hf["sliding_window"] = max(windows, default=None)
        elif self.model_type in ("qwen2", "qwen3"):
            hf["use_sliding_window"] = bool(windows)
            hf["sliding_window"] = max(windows, default=None)
            hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.sliding_windows]
        return hf


def _size(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = hf.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[name]:
        raise CheckpointError(f"config.json: {name} = {value!r} is not a whole number from 1 to {_LIMITS[name]}")
    return value


def _epsilon(hf: Mapping[str, Any]) -> float:
    value = hf.get("rms_norm_eps", 1e-6)
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise CheckpointError(f"config.json: rms_norm_eps = {value!r} is not a number from 0 to 1")
    return float(value)


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    if (act := hf.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {act!r} is not supported; supported: silu")
    if hf.get("mlp_bias"):
        raise CheckpointError("config.json: mlp_bias is not supported")
    if hf.get("quantization_config"):
        raise CheckpointError("config.json: quantized weights are not supported; supported: float32, float16, bfloat16")


def _sliding_windows(hf: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    """One window a layer, by transformers' rules: Mistral slides everywhere, Qwen where layer_types says so."""
    if model_type == "llama":
        return (None,) * layers
    window = hf.get("sliding_window", 4096)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise CheckpointError(f"config.json: sliding_window = {window!r} is not a positive whole number")
    if model_type == "mistral":
        return (window,) * layers
    if not hf.get("use_sliding_window", False):
        window = None
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise CheckpointError(f"config.json: max_window_layers = {first!r} is not a whole number")
        return tuple(window if i >= first else None for i in range(layers))
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        raise CheckpointError(f"config.json: layer_types must list {layers} layers, each {' or '.join(known)}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
