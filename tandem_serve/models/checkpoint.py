"""Checkpoints as standard Hugging Face folders: config.json, safetensors (sharded or not), tokenizer.json.

A tandem drafter is such a folder too, of model_type llama (or whatever its decoder is), with FF_Tandem as extra
tensors `tandem.ff.{j}.weight` and a `tandem` block in config.json. Weights are read from safetensors only: pickled
files can run code and are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from tandem_serve.errors import CheckpointError, ConfigError
from tandem_serve.models.acceptance import ROUTER_FILE, AcceptanceModel, load_acceptance
from tandem_serve.models.config import DecoderConfig
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.folder import eos_token_ids, load_tokenizer, read_json, resolve_folder, tokenizer_hash
from tandem_serve.models.tandem import TandemConfig, TandemDrafter, check_layer_map
from tandem_serve.models.weights import WEIGHTS_FILE, Shards, check_shapes, hf_tensors
from tandem_serve.types import DrafterInfo, PrimaryInfo

__all__ = [  # with what else callers know a checkpoint by, from folder.py
    "DTYPES",
    "atomic_folder",
    "drafter_acceptance",
    "drafter_info",
    "eos_token_ids",
    "fingerprint",
    "load_decoder",
    "load_drafter",
    "load_tokenizer",
    "primary_info",
    "resolve_folder",
    "save_decoder",
    "save_drafter",
    "tokenizer_hash",
    "write_model",
]

_Model = TypeVar("_Model", bound=nn.Module)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # what engines compute in, by the name in a YAML
_DTYPE_NAMES = {torch.float16: "float16"} | {dtype: name for name, dtype in DTYPES.items()}


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
    config = DecoderConfig.from_hf(read_json(folder / "config.json"))
    shards = Shards(folder)
    check_shapes(shards, Decoder(config, device="meta"), None)
    decoder = Decoder(config, dtype=dtype, device=device)
    shards.copy_into(hf_tensors(decoder))
    return _frozen(decoder)


def load_drafter(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TandemDrafter | Decoder:
    """A tandem drafter, or a plain one where config.json has no `tandem` block. Otherwise as `load_decoder`."""
    folder = resolve_folder(path_or_hub_id)
    hf = read_json(folder / "config.json")
    tandem = _tandem_config(hf)
    if tandem is None:
        return load_decoder(folder, dtype=dtype, device=device)
    config = DecoderConfig.from_hf(hf)
    if len(tandem.layer_map) != config.num_layers:
        raise CheckpointError(
            f"{folder}/config.json: tandem.layer_map has {len(tandem.layer_map)} entries for {config.num_layers} layers"
        )
    shards = Shards(folder)
    check_shapes(shards, Decoder(config, device="meta"), tandem)
    drafter = TandemDrafter(Decoder(config, dtype=dtype, device=device), tandem)
    shards.copy_into(hf_tensors(drafter))
    return _frozen(drafter)


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
            "layer_map": [taps[0] if len(taps) == 1 else list(taps) for taps in t.layer_map],
            "primary_hidden_size": t.primary_hidden_size,
            "primary_num_layers": t.primary_num_layers,
            "primary_fingerprint": t.primary_fingerprint,
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {n: t.cpu().clone(memory_format=torch.contiguous_format) for n, t in hf_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
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
    hf = read_json(folder / "config.json")
    digest = hashlib.sha256()
    shape = {"config": DecoderConfig.from_hf(hf).to_hf(), "tandem": hf.get("tandem")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for header, pages in Shards(folder).sampled_pages():
        digest.update(json.dumps(header).encode())
        for page in pages:
            digest.update(page)
    return digest.hexdigest()[:16]


def primary_info(
    path_or_hub_id: str | Path, *, model: str | None = None, max_model_len: int | None = None
) -> PrimaryInfo:
    """What a primary with this checkpoint tells its peers. `model` is the name to show; default: the folder's."""
    folder = resolve_folder(path_or_hub_id)
    config = DecoderConfig.from_hf(read_json(folder / "config.json"))
    return PrimaryInfo(
        model=model or _name(path_or_hub_id),
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
    hf = read_json(folder / "config.json")
    config, tandem = DecoderConfig.from_hf(hf), _tandem_config(hf)
    return DrafterInfo(
        model=model or _name(path_or_hub_id),
        fingerprint=fingerprint(folder),
        primary_fingerprint=tandem.primary_fingerprint if tandem else "",
        tokenizer_hash=tokenizer_hash(folder),
        vocab_size=config.vocab_size,
        taps=tandem.taps if tandem else (),
        primary_hidden_size=tandem.primary_hidden_size if tandem else 0,
        max_block_length=max_block_length,
        max_model_len=_model_len(config, max_model_len),
    )


def drafter_acceptance(path_or_hub_id: str | Path) -> AcceptanceModel | None:
    """The acceptance model beside a drafter's weights, where `train router` has made one. Raises CheckpointError."""
    folder = resolve_folder(path_or_hub_id)
    if not (folder / ROUTER_FILE).is_file():
        return None
    width = DecoderConfig.from_hf(read_json(folder / "config.json")).hidden_size
    return load_acceptance(folder, width, fingerprint(folder))


def _tandem_config(hf: Mapping[str, Any]) -> TandemConfig | None:
    block = hf.get("tandem")
    if block is None:
        return None
    try:
        config = TandemConfig(
            layer_map=tuple(_taps(entry) for entry in block["layer_map"]),
            primary_hidden_size=int(block["primary_hidden_size"]),
            primary_num_layers=int(block["primary_num_layers"]),
            primary_fingerprint=str(block["primary_fingerprint"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: damaged tandem block: {error!r}") from error
    try:
        check_layer_map(config.layer_map, config.primary_num_layers)
    except ConfigError as error:
        raise CheckpointError(f"config.json: tandem.layer_map: {error}") from error
    return config


def _taps(entry: Any) -> tuple[int, ...]:
    """One layer's taps: a number, or a list of them."""
    return tuple(int(tap) for tap in entry) if isinstance(entry, list) else (int(entry),)


def _name(path_or_hub_id: str | Path) -> str:
    folder = Path(path_or_hub_id).expanduser()
    return folder.resolve().name if folder.is_dir() else str(path_or_hub_id)


def _model_len(config: DecoderConfig, wanted: int | None) -> int:
    return min(wanted or config.max_position_embeddings, config.max_position_embeddings)


def _frozen(model: _Model) -> _Model:
    model.eval().requires_grad_(False)
    return model
