"""Where a drafter's weights begin: random, or cut out of a pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import load_decoder
from tandem_serve.models.config import DecoderConfig
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.folder import read_json, resolve_folder


@dataclass(frozen=True)
class DrafterShape:
    """The sizes of MS that are chosen; vocabulary and positions are the primary's."""

    num_layers: int = 2
    hidden_size: int = 160
    intermediate_size: int = 448
    num_heads: int = 5
    num_kv_heads: int = 5


def chosen_shape(given: Mapping[str, int | None], init_from: str) -> DrafterShape:
    """The sizes given; those left open are the source's where there is one, else DrafterShape's."""
    sizes = {name: value for name, value in given.items() if value is not None}
    if init_from:
        source = DecoderConfig.from_hf(read_json(resolve_folder(init_from) / "config.json"))
        names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        sizes = {name: getattr(source, name) for name in names} | sizes
    return DrafterShape(**sizes)


def initial_decoder(
    shape: DrafterShape,
    primary: DecoderConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    init_from: str = "",
    init_layers: Sequence[int] | None = None,
) -> Decoder:
    """MS without its projections: random weights, or those of the model in `init_from`, cut to shape."""
    if init_from:
        return sliced(load_decoder(init_from, device=device), shape, primary, init_layers)
    config = DecoderConfig(
        vocab_size=primary.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=primary.max_position_embeddings,
        tie_word_embeddings=True,
        eos_token_ids=primary.eos_token_ids,
    )
    return Decoder(config, device=device).init_weights(seed)


@torch.no_grad()
def sliced(
    source: Decoder, shape: DrafterShape, primary: DecoderConfig, layers: Sequence[int] | None = None
) -> Decoder:
    """A trainable copy of some layers of `source`, of the same family, cut to the first channels, heads and neurons.

    Args:
        layers: from 0; None: evenly spread, the last one included.

    Raises:
        ConfigError: where the source has less than is asked for, or another vocabulary than the primary.
    """
    c = source.config
    if layers is None:
        layers = [round((j + 1) * c.num_layers / shape.num_layers) - 1 for j in range(shape.num_layers)]
    _check_slice(c, shape, primary, layers)
    config = replace(
        c,
        num_layers=len(layers),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        sliding_windows=tuple(c.sliding_windows[layer] for layer in layers),
        max_position_embeddings=primary.max_position_embeddings,
        eos_token_ids=primary.eos_token_ids,
    )
    target = Decoder(config, device=source.device)
    channels = slice(shape.hidden_size)
    target.embedding.copy_(source.embedding[:, channels])
    target.norm.copy_(source.norm[channels])
    if target.head is not None and source.head is not None:
        target.head.copy_(source.head[channels])
    for new, old in enumerate(layers):
        _cut_layer(source.layers[old], target.layers[new], c, config)
    return target


def _cut_layer(source: torch.nn.Module, target: torch.nn.Module, c: DecoderConfig, new: DecoderConfig) -> None:
    columns = _head_columns(c, new).to(source.get_parameter("qkv").device)
    attended, channels, neurons = columns[: new.num_heads * new.head_dim], new.hidden_size, new.intermediate_size
    cuts: dict[str, Callable[[Tensor], Tensor]] = {
        "qkv": lambda w: w[:channels, columns],
        "qkv_bias": lambda w: w[columns],
        "output": lambda w: w[attended, :channels],
        "gate_up": lambda w: torch.cat([half[:channels, :neurons] for half in w.chunk(2, 1)], 1),
        "down": lambda w: w[:neurons, :channels],
        "q_norm": lambda w: w,
        "k_norm": lambda w: w,
    }
    for name, parameter in target.named_parameters():
        whole = source.get_parameter(name)
        parameter.copy_(cuts[name](whole) if name in cuts else whole[:channels])  # norms and output_bias


def _head_columns(c: DecoderConfig, new: DecoderConfig) -> Tensor:
    """qkv's columns of the first key/value heads, and of the first query heads that share each."""
    shared, kept = c.num_heads // c.num_kv_heads, new.num_heads // new.num_kv_heads
    queries = [kv * shared + q for kv in range(new.num_kv_heads) for q in range(kept)]
    keys = [c.num_heads + kv for kv in range(new.num_kv_heads)]
    values = [c.num_heads + c.num_kv_heads + kv for kv in range(new.num_kv_heads)]
    heads = torch.tensor([*queries, *keys, *values])
    return (heads[:, None] * c.head_dim + torch.arange(c.head_dim)).flatten()


def _check_slice(c: DecoderConfig, shape: DrafterShape, primary: DecoderConfig, layers: Sequence[int]) -> None:
    if c.vocab_size != primary.vocab_size:
        raise ConfigError(f"init-from: its vocabulary has {c.vocab_size} entries, the primary's {primary.vocab_size}")
    if len(layers) != shape.num_layers or not all(0 <= layer < c.num_layers for layer in layers):
        raise ConfigError(f"init-layers {list(layers)}: expected {shape.num_layers} of layers 0 to {c.num_layers - 1}")
    wanted = (shape.hidden_size, shape.intermediate_size, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads)
    found = (c.hidden_size, c.intermediate_size, c.num_kv_heads, c.num_heads // c.num_kv_heads)
    names = ("width", "FFN width", "number of key/value heads", "number of query heads a key/value head")
    for name, ours, theirs in zip(names, wanted, found, strict=True):
        if ours > theirs:
            raise ConfigError(f"init-from: a {name} of {ours} cannot be cut out of {theirs}")


def init_layers_of(text: str) -> tuple[int, ...] | None:
    """`0,7,15` as numbers; empty: None.

    Raises:
        ConfigError: for anything else.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ConfigError(f"init-layers {text!r}: expected layer numbers such as 0,7,15") from None
