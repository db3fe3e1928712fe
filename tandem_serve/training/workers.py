"""One run by several workers (torch.distributed): each has the whole drafter, and its share of every batch.

Outside a process group every function here is that of a single worker. Weights stay equal without being exchanged: all
workers begin with the same ones and apply the same averaged gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tandem_serve.models.decoder import Decoder, LayerWeights


def worker() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leads() -> bool:
    """Whether this worker is the one that writes."""
    return worker()[0] == 0


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """The block runs in the leading worker first; the others then find what it has left on disk."""
    if not leads():
        dist.barrier()
    yield
    if leads() and worker()[1] > 1:
        dist.barrier()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over all workers, in one exchange for each dtype."""
    _, size = worker()
    if size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def average_values(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over all workers of one number each."""
    _, size = worker()
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if size > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / size).tolist(), strict=True))


def shard_layers(decoder: Decoder) -> None:
    """Spreads a frozen decoder's layers over the workers (FSDP), in place; embedding and head stay whole everywhere.

    Each layer is gathered when a pass comes to it and let go after it: a worker holds 1 / workers of the layers, and
    one. Not for a decoder that is trained: the backward pass would find its layers gone.
    """
    if worker()[1] > 1:
        from torch.distributed.fsdp import fully_shard  # a second to import, and seldom needed

        decoder.requires_grad_(False)
        for layer in decoder.layers:
            fully_shard(layer)
        decoder.layer_weights = _GatheredInTurn(decoder)  # type: ignore[assignment]


class _GatheredInTurn(Sequence[LayerWeights]):
    """Stands in for Decoder.layer_weights: iterating gathers each layer for its turn."""

    def __init__(self, decoder: Decoder) -> None:
        self._layers: list[Any] = list(decoder.layers)  # FSDPModule by now
        self._weights = list(decoder.layer_weights)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> LayerWeights:  # type: ignore[override]
        raise TypeError("a sharded decoder's layers are there in turn only: they cannot be indexed")

    def __iter__(self) -> Iterator[LayerWeights]:
        for layer, weights in zip(self._layers, self._weights, strict=True):
            layer.unshard()
            yield weights  # a view of the layer's own dictionary, where the gathered tensors now are
            layer.reshard()
