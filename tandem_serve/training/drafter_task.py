"""One training step of drafters: a pass of the primary that all of them share, and each one's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tandem_serve.errors import ConfigError
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.data import TokenWindows, block_index
from tandem_serve.training.initial import DrafterShape
from tandem_serve.training.losses import distillation_loss, next_token_loss
from tandem_serve.training.peers.peer import Peer
from tandem_serve.training.primary import sequence_logits
from tandem_serve.training.unroll import drafter_taps
from tandem_serve.training.views import primary_view

TANDEM, PLAIN, PRIMARY = "drafter", "plain-drafter", "primary"
FROZEN, DRAFTER_LOSS, BOTH_LOSSES = "frozen", "drafter-loss", "both-losses"  # the paper's three configurations

Trained = TandemDrafter | Decoder | Peer


class Variant(NamedTuple):
    """What makes one of the drafters of a run different from the others."""

    kind: str
    layer_map: str
    block_lengths: tuple[int, int]  # one of this range is drawn per batch


@dataclass(frozen=True)
class DrafterConfig:
    """What is trained, and on what. Names all drafters where several are trained, side by side, on the same batches."""

    shape: DrafterShape = field(default_factory=DrafterShape)
    layer_map: str = "uniform"
    other_layer_maps: tuple[str, ...] = ()  # further tandem drafters, `drafter-MAP`, to be compared with the first
    block_lengths: tuple[int, int] = (1, 8)
    other_block_lengths: tuple[tuple[int, int], ...] = ()  # likewise, `drafter-blocks-LOW-HIGH`
    kinds: tuple[str, ...] = (TANDEM,)  # TANDEM, PLAIN and peers
    train_primary: str = FROZEN
    distillation_weight: float = 0.5
    cross_entropy_share: float = 0.15  # of the steps: stage 1, before the primary's softmax joins
    sampled_tokens: int = 0  # length of the text that the primary writes itself, to be trained on with the corpus
    sampled_share: float = 0.5  # of the steps, that train on it
    init_from: str = ""  # a pretrained model that MS is cut out of
    init_layers: tuple[int, ...] | None = None
    start_from: str = ""  # fingerprints of the drafters that a run goes on from, set by train_drafters

    def __post_init__(self) -> None:
        if self.train_primary not in (FROZEN, DRAFTER_LOSS, BOTH_LOSSES):
            raise ConfigError(f"train-primary {self.train_primary!r}: expected frozen, drafter-loss or both-losses")
        if self.train_primary != FROZEN and (len(self.names) > 1 or PLAIN in self.names):
            raise ConfigError("a primary can be trained along with one drafter that reads it, not with several or none")

    @property
    def names(self) -> dict[str, Variant]:
        """Every drafter, by its name."""
        own, layer_map = self.block_lengths, self.layer_map
        names = {kind: Variant(kind, layer_map, own) for kind in self.kinds}
        names |= {f"{TANDEM}-{other}": Variant(TANDEM, other, own) for other in self.other_layer_maps}
        others = {_blocks_name(other): Variant(TANDEM, layer_map, other) for other in self.other_block_lengths}
        return names | others


def _blocks_name(block_lengths: tuple[int, int]) -> str:
    """`drafter-blocks-5`, `drafter-blocks-1-16`."""
    return "-".join([TANDEM, "blocks", *map(str, dict.fromkeys(block_lengths))])


class TeacherView(NamedTuple):
    """What the primary says of a batch."""

    representations: Tensor  # [B, T, num_taps, d_L]
    probabilities: Tensor  # [B, T, V] float32, without gradient
    loss: Tensor | None  # the primary's own, where it is trained on it


class DrafterTask:
    """One forward pass of the primary a step, shared by every drafter: equal tokens in equal order by construction.

    Where the primary is trained along, the drafter's loss reaches it through its representations, and through nothing
    else: as a teacher it is taken as it is.
    """

    def __init__(
        self,
        primary: Decoder,
        drafters: Mapping[str, Trained],
        windows: TokenWindows,
        sampled: TokenWindows | None,
        config: DrafterConfig,
        identity: Mapping[str, Any],
        device: str,
    ) -> None:
        self.identity = identity
        self.tokens_per_step = windows.tokens_per_batch
        self._trains_primary = config.train_primary != FROZEN
        self.models: Mapping[str, nn.Module] = {**drafters, **({PRIMARY: primary} if self._trains_primary else {})}
        self._drafters = drafters
        self._primary = primary.requires_grad_(self._trains_primary)
        self._windows = windows
        self._sampled = sampled
        self._config = config
        self._device = device
        self._block_lengths = {name: variant.block_lengths for name, variant in config.names.items()}
        self._taps = tuple(sorted({tap for drafter in drafters.values() for tap in drafter_taps(drafter)}))
        # Only the primary: half of a step is its pass, and drafters take longer to compile than compiling them saves.
        self._view = torch.compile(self._run_primary) if identity["compile"] else self._run_primary

    def losses(self, step: int, num_steps: int) -> dict[str, Tensor]:
        batch = self._batch(step).to(self._device)
        token_ids, targets = batch[:, :-1], batch[:, 1:]
        with torch.set_grad_enabled(self._trains_primary):
            view = self._view(token_ids, targets)
        distils = step >= self._config.cross_entropy_share * num_steps
        weight = self._config.distillation_weight if distils else 0.0
        losses = {}
        for name, drafter in self._drafters.items():
            blocks = block_index(step, token_ids.shape[1], self._block_lengths[name], self._windows.seed)
            seen = view._replace(representations=self._seen_by(drafter, view.representations))
            losses[name] = _loss(drafter, token_ids, targets, seen, blocks.to(self._device), weight)
        return losses if view.loss is None else {**losses, PRIMARY: view.loss}

    def _seen_by(self, drafter: Trained, representations: Tensor) -> Tensor:
        """The taps that one drafter reads, of those that any reads."""
        taps = drafter_taps(drafter)
        return representations if taps == self._taps else representations[..., [self._taps.index(t) for t in taps], :]

    def _batch(self, step: int) -> Tensor:
        """The corpus's windows and the primary's own take turns, evenly, in the proportion asked for."""
        share = self._config.sampled_share if self._sampled else 0.0
        turn = int(step * share)  # sampled batches so far
        if self._sampled and int((step + 1) * share) > turn:
            return self._sampled.batch(turn)
        return self._windows.batch(step - turn)

    def _run_primary(self, token_ids: Tensor, targets: Tensor) -> TeacherView:
        view = primary_view(self._primary, token_ids, self._taps)
        has_loss = self._config.train_primary == BOTH_LOSSES
        return TeacherView(
            view.representations,
            view.logits.detach().float().softmax(-1),
            next_token_loss(view.logits, targets) if has_loss else None,
        )


def _loss(
    drafter: Trained, token_ids: Tensor, targets: Tensor, view: TeacherView, blocks: Tensor, weight: float
) -> Tensor:
    """distillation_loss: of one pass for MS, of the mean over a block's drafts for a peer."""
    if isinstance(drafter, Peer):
        steps = drafter.unroll(token_ids, view.representations, drafter.num_training_steps)
        return torch.stack(
            [
                distillation_loss(logits[:, s:], targets[:, s:], view.probabilities[:, s:], weight)
                for s, logits in enumerate(steps)
            ]
        ).mean()
    logits = drafter_logits(drafter, token_ids, view.representations, blocks)
    return distillation_loss(logits, targets, view.probabilities, weight)


def drafter_logits(
    drafter: TandemDrafter | Decoder, token_ids: Tensor, representations: Tensor, blocks: Tensor
) -> Tensor:
    """Logits [B, T, V] of a drafter for whole sequences. A plain one takes no notice of representations and blocks."""
    if isinstance(drafter, TandemDrafter):
        return drafter.logits(drafter.forward_blocks(token_ids, representations, blocks))
    return sequence_logits(drafter, token_ids)
