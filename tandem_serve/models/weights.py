"""A model's weights under their Hugging Face names, and the safetensors files that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem_serve.errors import CheckpointError
from tandem_serve.models.decoder import Decoder, DecoderConfig, LayerWeights
from tandem_serve.models.folder import read_json
from tandem_serve.models.tandem import TandemConfig, TandemDrafter

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOAT_TYPES = {"F32", "F16", "BF16"}
_PAGE_BYTES, _PAGES = 4096, 16  # of each tensor, for the fingerprint


def hf_tensors(model: TandemDrafter | Decoder) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, as views of the model's parameters: to save from and to load into."""
    if isinstance(model, TandemDrafter):
        projections = {f"tandem.ff.{j}.weight": model.ff.data[j].t() for j in range(model.ff.shape[0])}
        return {**hf_tensors(model.decoder), **projections}
    tensors = {"model.embed_tokens.weight": model.embedding.data, "model.norm.weight": model.norm.data}
    if model.head is not None:
        tensors["lm_head.weight"] = model.head.data.t()
    for i, w in enumerate(model.layer_weights):
        tensors.update({f"model.layers.{i}.{name}": t.data for name, t in _layer_tensors(model.config, w).items()})
    return tensors


def _layer_tensors(c: DecoderConfig, w: LayerWeights) -> dict[str, Tensor]:
    parts = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate, up = w["gate_up"].detach().t().chunk(2)
    tensors = {
        "input_layernorm.weight": w["attention_norm"],
        "post_attention_layernorm.weight": w["mlp_norm"],
        "self_attn.o_proj.weight": w["output"].detach().t(),
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": w["down"].detach().t(),
        **{f"{name}.weight": part for name, part in zip(names, w["qkv"].detach().t().split(parts), strict=True)},
    }
    if w["qkv_bias"] is not None:
        tensors |= {f"{name}.bias": part for name, part in zip(names, w["qkv_bias"].detach().split(parts), strict=True)}
    if w["output_bias"] is not None:
        tensors["self_attn.o_proj.bias"] = w["output_bias"]
    if w["q_norm"] is not None and w["k_norm"] is not None:
        tensors |= {"self_attn.q_norm.weight": w["q_norm"], "self_attn.k_norm.weight": w["k_norm"]}
    return tensors


class Shards:
    """The safetensors files of a folder: which tensor lies where, checked before anything is allocated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in self._files():
            try:
                with safe_open(folder / file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                        part = handle.get_slice(name)
                        self._file_of[name] = file
                        self.shapes[name] = tuple(part.get_shape())
                        self._dtypes[name] = str(part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file}: not a readable safetensors file: {error}") from error
        if bad := {n: d for n, d in self._dtypes.items() if d not in _FLOAT_TYPES}:
            name, kind = next(iter(bad.items()))
            raise CheckpointError(f"{folder}: tensor {name} is {kind}; supported: {', '.join(sorted(_FLOAT_TYPES))}")

    def _files(self) -> list[str]:
        if (self.folder / INDEX_FILE).is_file():
            index = self.folder / INDEX_FILE
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{index}: no weight_map of names to files")
            files = sorted(set(weight_map.values()))
            if bad := [f for f in files if Path(f).name != f or not f.endswith(".safetensors")]:
                raise CheckpointError(f"{index}: {bad[0]!r} is not a safetensors file of this folder")
            return files
        if (self.folder / WEIGHTS_FILE).is_file():
            return [WEIGHTS_FILE]
        raise CheckpointError(f"{self.folder}: no {WEIGHTS_FILE} or {INDEX_FILE}")

    def copy_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills every tensor from its file, one at a time: peak memory is the model and one tensor."""
        for file in sorted(set(self._file_of.values())):
            with safe_open(self.folder / file, framework="pt") as handle:
                for name, where in self._file_of.items():
                    if where == file and name in tensors:
                        tensors[name].copy_(handle.get_tensor(name))

    def sampled_pages(self) -> Iterator[tuple[tuple[str, str, tuple[int, ...]], list[bytes]]]:
        """For each tensor, by name: (name, dtype, shape) and pages evenly spread over its bytes."""
        for name in sorted(self._file_of):
            with safe_open(self.folder / self._file_of[name], framework="pt") as handle:
                flat = handle.get_tensor(name).reshape(-1).view(torch.uint8)
            step = max(_PAGE_BYTES, (flat.numel() - _PAGE_BYTES) // (_PAGES - 1))
            starts = range(0, max(1, flat.numel() - _PAGE_BYTES + 1), step)
            pages = [flat[s : s + _PAGE_BYTES].numpy().tobytes() for s in starts]
            yield (name, self._dtypes[name], self.shapes[name]), pages


def check_shapes(shards: Shards, decoder: Decoder, tandem: TandemConfig | None) -> None:
    """Compares names and shapes with what the config promises, on meta tensors: an absurd config allocates nothing."""
    expected: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in hf_tensors(decoder).items()}
    if tandem is not None:
        shape = (decoder.config.hidden_size, len(tandem.layer_map[0]) * tandem.primary_hidden_size)
        expected |= {f"tandem.ff.{j}.weight": shape for j in range(decoder.config.num_layers)}
    for name, wanted in expected.items():
        found = shards.shapes.get(name)
        if found is None:
            raise CheckpointError(f"{shards.folder}: tensor {name} is missing")
        if found != wanted:
            raise CheckpointError(f"{shards.folder}: tensor {name} has shape {found}; config.json implies {wanted}")
    tied = {"lm_head.weight"} if decoder.config.tie_word_embeddings else set()
    extra = [n for n in shards.shapes if n not in expected and n not in tied and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(f"{shards.folder}: {len(extra)} unexpected tensors, the first: {sorted(extra)[0]}")
