"""The router MLP: how likely a draft is right, from what the drafter knows of it (the paper's adaptive block length).

Lies as `router.safetensors` beside a drafter's weights. Two models of different cost in one file: the paper's MLP
(entropy, top-k probabilities, the top-k ids' embeddings), and a quick one, logistic in the draft's own probability.
Shape letters: B drafts, V vocabulary, k best ids, d width of MS, h width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tandem_serve.errors import CheckpointError
from tandem_serve.types import PolicyName

ROUTER_FILE = "router.safetensors"
FORMAT = "tandem-router-2"
EMBEDDING_DROPOUT = 0.95
_REMEDY = "run `tandem-serve train router` again, or remove it"
MAX_TOP_K, MAX_HIDDEN_SIZE = 64, 4096


class DraftFeatures(NamedTuple):
    """What the models look at, of drafts [...]."""

    entropy: Tensor  # [...] of MS's softmax, nats
    draft_logprob: Tensor  # [...] of the draft, under the softmax of the scores that chose it
    is_sampled: Tensor  # [...] bool; else greedy
    top_probs: Tensor  # [..., k]
    top_ids: Tensor  # [..., k] int64


def draft_features(logits: Tensor, draft_logprobs: Tensor, is_sampled: Tensor, top_k: int) -> DraftFeatures:
    """Of drafts with draft_logprobs and is_sampled [B], chosen by logits [B, V]."""
    probs = logits.softmax(-1)
    top = probs.topk(top_k, -1)
    return DraftFeatures(torch.special.entr(probs).sum(-1), draft_logprobs, is_sampled, top.values, top.indices)


@dataclass(frozen=True)
class AcceptanceConfig:
    """Shape of the MLP."""

    drafter_hidden_size: int
    top_k: int = 4
    hidden_size: int = 64

    @property
    def num_inputs(self) -> int:
        return 3 + self.top_k * (1 + self.drafter_hidden_size)


class AcceptanceModel(nn.Module):
    """Both models, and the thresholds that a measurement found best for the policies that use them.

    What they return are log-odds of acceptance, [...].
    """

    def __init__(self, config: AcceptanceConfig) -> None:
        super().__init__()
        self.config = config
        self.input = nn.Linear(config.num_inputs, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.input.weight.detach()[:, 3 + config.top_k :])  # what the embeddings say is to be learnt
        # Greedy, sampled; at first MS's own odds.
        self.quick_weights = nn.Parameter(torch.tensor([[1.0, -1.0, 0.0]] * 2))
        self.thresholds: dict[PolicyName, float] = {}

    def mlp(self, features: DraftFeatures, embedding: Tensor) -> Tensor:
        """The paper's: from entropy, top-k probabilities, and the top-k ids' rows of MS's embedding [V, d].

        And the draft's own probability: where drafts are sampled it need not be one of the top k.
        """
        embedded = F.rms_norm(F.embedding(features.top_ids, embedding).float(), embedding.shape[-1:]).flatten(-2)
        embedded = F.dropout(embedded, EMBEDDING_DROPOUT, self.training)  # or it learns texts by heart
        logprobs = features.top_probs.clamp(min=1e-6).log()
        own = torch.stack((features.entropy, features.draft_logprob.clamp(min=-20), features.is_sampled.float()), -1)
        x = torch.cat((own, logprobs, embedded), -1)
        hidden: Tensor = self.output(F.relu(self.input(x)))
        return hidden.squeeze(-1)

    def quick(self, draft_logprob: Tensor, is_sampled: Tensor) -> Tensor:
        """From a draft's own log-probability [...] alone: linear in log p and log(1 - p); greedy and sampled apart."""
        weights = self.quick_weights[is_sampled.long()].unbind(-1)
        draft_logprob = draft_logprob.clamp(min=-20)
        rest = torch.log1p(-draft_logprob.clamp(max=-1e-4).exp())
        return weights[0] * draft_logprob + weights[1] * rest + weights[2]


# ------------------------------------------------------------------ the file


def save_acceptance(model: AcceptanceModel, drafter_folder: Path, drafter_fingerprint: str) -> Path:
    """Writes router.safetensors beside the drafter that it was trained for, in place of an earlier one."""
    config = model.config
    metadata = {
        "format": FORMAT,
        "drafter_fingerprint": drafter_fingerprint,
        "top_k": str(config.top_k),
        **{f"threshold.{policy.value}": repr(value) for policy, value in model.thresholds.items()},
    }
    file = drafter_folder / ROUTER_FILE
    fresh = file.with_suffix(".new")
    save_file({name: t.detach().float().contiguous() for name, t in model.state_dict().items()}, fresh, metadata)
    fresh.replace(file)
    return file


def load_acceptance(drafter_folder: Path, drafter_hidden_size: int, drafter_fingerprint: str) -> AcceptanceModel:
    """The model beside a drafter.

    Raises:
        CheckpointError: it is damaged, of another format, or was trained for another drafter.
    """
    file = drafter_folder / ROUTER_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format {metadata.get('format')!r}, expected {FORMAT!r}; {_REMEDY}")
    if metadata.get("drafter_fingerprint") != drafter_fingerprint:
        found = metadata.get("drafter_fingerprint")
        raise CheckpointError(f"{file}: made for the drafter {found!r}, this one is {drafter_fingerprint!r}; {_REMEDY}")
    try:
        model = AcceptanceModel(_config(metadata, tensors, drafter_hidden_size))
        model.thresholds = _thresholds(metadata)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    _copy(tensors, model, file)
    return model.eval().requires_grad_(False)


def _config(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], drafter_hidden_size: int) -> AcceptanceConfig:
    top_k = int(metadata["top_k"])
    hidden_size = tensors["output.weight"].shape[-1]
    if not (1 <= top_k <= MAX_TOP_K and 1 <= hidden_size <= MAX_HIDDEN_SIZE):
        raise ValueError(f"top_k {top_k}, hidden size {hidden_size}")
    return AcceptanceConfig(drafter_hidden_size, top_k, hidden_size)


def _thresholds(metadata: Mapping[str, str]) -> dict[PolicyName, float]:
    named = {p: metadata[f"threshold.{p.value}"] for p in PolicyName if f"threshold.{p.value}" in metadata}
    thresholds = {policy: float(text) for policy, text in named.items()}
    if wrong := {policy.value: value for policy, value in thresholds.items() if not 0 <= value <= 1}:
        raise ValueError(f"thresholds {wrong} are not within 0..1")
    return thresholds


def _copy(tensors: Mapping[str, Tensor], model: AcceptanceModel, file: Path) -> None:
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        raise CheckpointError(f"{file}: tensors {found}, expected {expected}")
    if bad := [name for name, t in tensors.items() if not (t.is_floating_point() and bool(torch.isfinite(t).all()))]:
        raise CheckpointError(f"{file}: {bad[0]} has values that are no finite numbers")
    model.load_state_dict(dict(tensors))
