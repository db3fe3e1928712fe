"""Checkpoints as standard Hugging Face folders: config.json, safetensors (sharded or not), tokenizer.json.

A tandem drafter is such a folder too, of model_type llama (or whatever its decoder is), with FF_Tandem as extra
tensors `tandem.ff.{j}.weight` and a `tandem` block in config.json. Weights are read from safetensors only: pickled
files can run code and are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tandem_serve.errors import CheckpointError
from tandem_serve.models.config import DecoderConfig, token_id_list
from tandem_serve.models.decoder import Decoder, LayerWeights
from tandem_serve.models.tandem import TandemConfig, TandemDrafter
from tandem_serve.types import DrafterInfo, PrimaryInfo

_Model = TypeVar("_Model", bound=nn.Module)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_FLOAT_TYPES = {"F32", "F16", "BF16"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PAGE_BYTES, _PAGES = 4096, 16  # of each tensor, for the fingerprint


# ------------------------------------------------------------------ public: load


def load_decoder(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A decoder of the Llama family from a folder or a Hugging Face hub id (`owner/name`, `owner/name@revision`).

    The weights are converted to `dtype`. The model comes back in eval mode, without gradients.

    Raises:
        CheckpointError: naming the file and what is missing, damaged or unsupported.
    """
    folder = resolve_folder(path_or_hub_id)
    config = DecoderConfig.from_hf(_read_json(folder / "config.json"))
    shards = _Shards(folder)
    _check_shapes(shards, Decoder(config, device="meta"), None)
    decoder = Decoder(config, dtype=dtype, device=device)
    shards.copy_into(hf_tensors(decoder))
    return _frozen(decoder)


def load_drafter(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TandemDrafter | Decoder:
    """A tandem drafter, or a plain one where config.json has no `tandem` block. Otherwise as `load_decoder`."""
    folder = resolve_folder(path_or_hub_id)
    hf = _read_json(folder / "config.json")
    tandem = _tandem_config(hf)
    if tandem is None:
        return load_decoder(folder, dtype=dtype, device=device)
    config = DecoderConfig.from_hf(hf)
    if len(tandem.layer_map) != config.num_layers:
        raise CheckpointError(
            f"{folder}/config.json: tandem.layer_map has {len(tandem.layer_map)} entries for {config.num_layers} layers"
        )
    shards = _Shards(folder)
    _check_shapes(shards, Decoder(config, device="meta"), tandem)
    drafter = TandemDrafter(Decoder(config, dtype=dtype, device=device), tandem)
    shards.copy_into(hf_tensors(drafter))
    return _frozen(drafter)


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: where tokenizer.json is missing or unreadable.
    """
    file = resolve_folder(path_or_hub_id) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: no tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


# ------------------------------------------------------------------ public: save


def save_decoder(decoder: Decoder, path: str | Path, *, tokenizer_from: str | Path | None = None) -> None:
    """Writes a decoder as a standard HF folder that transformers loads; replaces a folder of that name as a whole."""
    with atomic_folder(path) as folder:
        write_model(decoder, folder, tokenizer_from=tokenizer_from)


def save_drafter(
    drafter: TandemDrafter | Decoder, path: str | Path, *, tokenizer_from: str | Path | None = None
) -> None:
    """Writes a drafter, tandem or plain, likewise."""
    with atomic_folder(path) as folder:
        write_model(drafter, folder, tokenizer_from=tokenizer_from)


def write_model(model: TandemDrafter | Decoder, folder: Path, *, tokenizer_from: str | Path | None = None) -> None:
    """Writes config.json, the weights and a copy of the tokenizer files into an existing folder, not atomically."""
    decoder = model.decoder if isinstance(model, TandemDrafter) else model
    config = {**decoder.config.to_hf(), "torch_dtype": _DTYPE_NAMES[decoder.dtype]}
    if isinstance(model, TandemDrafter):
        t = model.config
        config["tandem"] = {
            "layer_map": list(t.layer_map),
            "primary_hidden_size": t.primary_hidden_size,
            "primary_num_layers": t.primary_num_layers,
            "primary_fingerprint": t.primary_fingerprint,
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in hf_tensors(model).items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    if tokenizer_from is not None:
        source = resolve_folder(tokenizer_from)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A fresh folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    A kill leaves either the old folder or the new one under `path`; only between the two renames that replace an
    existing folder is there neither (the old one then lies beside it as `.NAME.old-*`).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    fresh, old = target.with_name(f".{target.name}.new-{mark}"), target.with_name(f".{target.name}.old-{mark}")
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------ public: identity


def fingerprint(path_or_hub_id: str | Path) -> str:
    """Names a model's weights: 16 hex digits, independent of folder, file dates and sharding.

    SHA-256 over the shape (DecoderConfig and tandem block), and each tensor's name, dtype, shape and 16 pages spread
    over its bytes. Fast for any size, and tells any two trained models apart; not proof against a forger who edits
    the bytes between the pages.
    """
    folder = resolve_folder(path_or_hub_id)
    hf = _read_json(folder / "config.json")
    digest = hashlib.sha256()
    shape = {"config": DecoderConfig.from_hf(hf).to_hf(), "tandem": hf.get("tandem")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for header, pages in _Shards(folder).sampled_pages():
        digest.update(json.dumps(header).encode())
        for page in pages:
            digest.update(page)
    return digest.hexdigest()[:16]


def tokenizer_hash(path_or_hub_id: str | Path) -> str:
    """Names what a tokenizer does: 16 hex digits of tokenizer.json's canonical content."""
    content = _read_json(resolve_folder(path_or_hub_id) / "tokenizer.json")
    content.pop("padding", None)  # how a batch was last padded or cut, not what the ids mean
    content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def primary_info(
    path_or_hub_id: str | Path, *, model: str | None = None, max_model_len: int | None = None
) -> PrimaryInfo:
    """What a primary with this checkpoint tells its peers. `model` is the name to show; default: the folder's."""
    folder = resolve_folder(path_or_hub_id)
    config = DecoderConfig.from_hf(_read_json(folder / "config.json"))
    return PrimaryInfo(
        model=model or folder.name,
        fingerprint=fingerprint(folder),
        tokenizer_hash=tokenizer_hash(folder),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        max_model_len=_model_len(config, max_model_len),
    )


def drafter_info(
    path_or_hub_id: str | Path,
    *,
    max_block_length: int,
    model: str | None = None,
    max_model_len: int | None = None,
) -> DrafterInfo:
    """What a drafter with this checkpoint, tandem or plain, tells its peers."""
    folder = resolve_folder(path_or_hub_id)
    hf = _read_json(folder / "config.json")
    config, tandem = DecoderConfig.from_hf(hf), _tandem_config(hf)
    return DrafterInfo(
        model=model or folder.name,
        fingerprint=fingerprint(folder),
        primary_fingerprint=tandem.primary_fingerprint if tandem else "",
        tokenizer_hash=tokenizer_hash(folder),
        vocab_size=config.vocab_size,
        taps=tandem.taps if tandem else (),
        primary_hidden_size=tandem.primary_hidden_size if tandem else 0,
        max_block_length=max_block_length,
        max_model_len=_model_len(config, max_model_len),
    )


def eos_token_ids(path_or_hub_id: str | Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, else config.json's. Empty where neither names one."""
    folder = resolve_folder(path_or_hub_id)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = token_id_list(_read_json(folder / name).get("eos_token_id"))
            if ids:
                return ids
    return ()


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """A checkpoint's local folder; a hub id is downloaded (or found in the cache) first.

    Raises:
        CheckpointError: where there is neither such a folder nor such a repository.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name[0] in "./":
        raise CheckpointError(f"{name}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except Exception as error:  # network, authentication and lookup errors share no base class
        raise CheckpointError(f"{name}: no such folder, and not to be had from the hub: {error}") from error


# ------------------------------------------------------------------ tensors by their Hugging Face names


def hf_tensors(model: TandemDrafter | Decoder) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, as views into the model's fused parameters: to save from and load into."""
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
    gate, up = w.gate_up.detach().t().chunk(2)
    tensors = {
        "input_layernorm.weight": w.attention_norm,
        "post_attention_layernorm.weight": w.mlp_norm,
        "self_attn.o_proj.weight": w.output.detach().t(),
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": w.down.detach().t(),
        **{f"{name}.weight": part for name, part in zip(names, w.qkv.detach().t().split(parts), strict=True)},
    }
    if w.qkv_bias is not None:
        tensors |= {f"{name}.bias": part for name, part in zip(names, w.qkv_bias.detach().split(parts), strict=True)}
    if w.output_bias is not None:
        tensors["self_attn.o_proj.bias"] = w.output_bias
    if w.q_norm is not None and w.k_norm is not None:
        tensors |= {"self_attn.q_norm.weight": w.q_norm, "self_attn.k_norm.weight": w.k_norm}
    return tensors


class _Shards:
    """The safetensors files of a folder: which tensor lies where, checked before anything is allocated."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        if (self._folder / _INDEX).is_file():
            weight_map = _read_json(self._folder / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{self._folder / _INDEX}: no weight_map of names to files")
            files = sorted(set(weight_map.values()))
            if bad := [f for f in files if Path(f).name != f or not f.endswith(".safetensors")]:
                raise CheckpointError(f"{self._folder / _INDEX}: {bad[0]!r} is not a safetensors file of this folder")
            return files
        if (self._folder / _WEIGHTS).is_file():
            return [_WEIGHTS]
        pickled = any(self._folder.glob("*.bin")) or any(self._folder.glob("*.pt*"))
        hint = "; pickled weights (.bin, .pt) can run code and are refused: convert them to safetensors"
        raise CheckpointError(f"{self._folder}: no {_WEIGHTS} or {_INDEX}{hint if pickled else ''}")

    def copy_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills every tensor from its file, one at a time: peak memory is the model and one tensor."""
        for file in sorted(set(self._file_of.values())):
            with safe_open(self._folder / file, framework="pt") as handle:
                for name, where in self._file_of.items():
                    if where == file and name in tensors:
                        tensors[name].copy_(handle.get_tensor(name))

    def sampled_pages(self) -> Iterator[tuple[tuple[str, str, tuple[int, ...]], list[bytes]]]:
        """For each tensor, by name: (name, dtype, shape) and pages evenly spread over its bytes."""
        for name in sorted(self._file_of):
            with safe_open(self._folder / self._file_of[name], framework="pt") as handle:
                flat = handle.get_tensor(name).reshape(-1).view(torch.uint8)
            step = max(_PAGE_BYTES, (flat.numel() - _PAGE_BYTES) // (_PAGES - 1))
            starts = range(0, max(1, flat.numel() - _PAGE_BYTES + 1), step)
            pages = [flat[s : s + _PAGE_BYTES].numpy().tobytes() for s in starts]
            yield (name, self._dtypes[name], self.shapes[name]), pages


def _check_shapes(shards: _Shards, decoder: Decoder, tandem: TandemConfig | None) -> None:
    """Compares names and shapes with what the config promises, on meta tensors: an absurd config allocates nothing."""
    expected = {name: tuple(t.shape) for name, t in hf_tensors(decoder).items()}
    if tandem is not None:
        shape = (decoder.config.hidden_size, tandem.primary_hidden_size)
        expected |= {f"tandem.ff.{j}.weight": shape for j in range(decoder.config.num_layers)}
    for name, shape in expected.items():
        if name not in shards.shapes:
            raise CheckpointError(f"tensor {name} is missing")
        if shards.shapes[name] != shape:
            raise CheckpointError(f"tensor {name} has shape {shards.shapes[name]}; config.json implies {shape}")
    tied = {"lm_head.weight"} if decoder.config.tie_word_embeddings else set()
    extra = [n for n in shards.shapes if n not in expected and n not in tied and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(f"{len(extra)} unexpected tensors, the first: {sorted(extra)[0]}")


def _tandem_config(hf: Mapping[str, Any]) -> TandemConfig | None:
    block = hf.get("tandem")
    if block is None:
        return None
    try:
        config = TandemConfig(
            layer_map=tuple(int(layer) for layer in block["layer_map"]),
            primary_hidden_size=int(block["primary_hidden_size"]),
            primary_num_layers=int(block["primary_num_layers"]),
            primary_fingerprint=str(block["primary_fingerprint"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: damaged tandem block: {error!r}") from error
    if not all(0 <= layer <= config.primary_num_layers for layer in config.layer_map):
        raise CheckpointError(f"config.json: tandem.layer_map {config.layer_map} names layers the primary has not")
    return config


def _model_len(config: DecoderConfig, wanted: int | None) -> int:
    return min(wanted or config.max_position_embeddings, config.max_position_embeddings)


def _frozen(model: _Model) -> _Model:
    model.eval().requires_grad_(False)
    return model


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: no {file.name}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return content
