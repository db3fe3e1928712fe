"""Peers by name: built, saved, loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem_serve.errors import CheckpointError
from tandem_serve.models.checkpoint import load_drafter
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.folder import read_json
from tandem_serve.training.initial import DrafterShape
from tandem_serve.training.peers.deep_tandem import DeepTandem
from tandem_serve.training.peers.eagle import Eagle
from tandem_serve.training.peers.medusa import Medusa
from tandem_serve.training.peers.peer import Peer
from tandem_serve.training.peers.prompt_lookup import PromptLookup
from tandem_serve.training.unroll import Drafter

PEERS = (Medusa.kind, Eagle.kind, DeepTandem.kind)
_CONFIG, _WEIGHTS = "peer.json", "peer.safetensors"


def build_peer(kind: str, primary: Decoder, shape: DrafterShape, longest_block: int, seed: int = 0) -> Peer:
    """A fresh peer: MEDUSA takes a head for each draft, the others an own decoder of that shape."""
    if kind == Medusa.kind:
        return Medusa(primary, longest_block)
    if kind == Eagle.kind:
        return Eagle(primary, shape, num_training_steps=min(4, longest_block), seed=seed)
    return DeepTandem(primary, shape, longest_block, seed)


def save_peer(peer: Peer, folder: Path) -> None:
    """Writes a peer into an existing folder, in bf16."""
    document = {"peer": peer.kind, "settings": peer.settings()}
    (folder / _CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, Tensor] = peer.state_dict()
    save_file({n: t.to("cpu", torch.bfloat16).contiguous() for n, t in tensors.items()}, folder / _WEIGHTS)


def load_peer(folder: Path, primary: Decoder) -> Peer:
    """A peer, in float32 and frozen, for the primary that it was trained with.

    Raises:
        CheckpointError: where the folder holds none.
    """
    document = read_json(folder / _CONFIG)
    try:
        peer = _rebuilt(document["peer"], document["settings"], primary)
        peer.load_state_dict({n: t.float() for n, t in load_file(folder / _WEIGHTS).items()})
    except (KeyError, TypeError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: not a peer of this primary: {error}") from error
    return peer.eval().requires_grad_(False)


def load_any(folder: str, primary: Decoder, device: str = "cpu") -> Drafter | PromptLookup:
    """What `eval --drafter NAME=...` names: a drafter's folder, a peer's, or `prompt-lookup`."""
    if folder == PromptLookup.kind:
        return PromptLookup()
    if (Path(folder) / _CONFIG).is_file():
        return load_peer(Path(folder), primary)
    return load_drafter(folder, device=device)


def runs_of(drafter: Drafter | PromptLookup) -> Callable[[int], int]:
    """How many passes a block of so many drafts takes: one each, one in all for MEDUSA's heads, none for lookup."""
    if isinstance(drafter, PromptLookup):
        return lambda drafts: 0
    if isinstance(drafter, Medusa):
        return lambda drafts: min(1, drafts)
    return lambda drafts: drafts


def _rebuilt(kind: str, settings: dict[str, Any], primary: Decoder) -> Peer:
    if "shape" in settings:
        settings = settings | {"shape": DrafterShape(**settings["shape"])}
    classes: dict[str, Any] = {Medusa.kind: Medusa, Eagle.kind: Eagle, DeepTandem.kind: DeepTandem}
    peer: Peer = classes[kind](primary, **settings)
    return peer
