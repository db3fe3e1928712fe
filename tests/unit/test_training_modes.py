"""Training configurations: which models learn from which loss, and where weights begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import save_decoder
from tandem_serve.models.decoder import Decoder, DecoderConfig
from tandem_serve.training.data import TokenWindows
from tandem_serve.training.drafter_task import (
    BOTH_LOSSES,
    DRAFTER_LOSS,
    FROZEN,
    PLAIN,
    TANDEM,
    DrafterConfig,
    DrafterTask,
)
from tandem_serve.training.initial import DrafterShape, chosen_shape, init_layers_of, initial_decoder, sliced
from tandem_serve.training.primary import sequence_logits
from tests.small_models import small_decoder, small_tandem

_STREAM = np.random.default_rng(0).integers(37, size=600).astype(np.int32)


def _gradients(mode: str, weight: float = 0.5) -> tuple[dict[str, float], Decoder]:
    """The loss of each model after a backward pass, and the primary with its gradients."""
    primary = small_decoder(3, 24, 0)
    drafter = small_tandem(primary).requires_grad_(True)
    config = DrafterConfig(train_primary=mode, distillation_weight=weight, cross_entropy_share=0.0)
    task = DrafterTask(
        primary, {TANDEM: drafter}, TokenWindows(_STREAM, 16, 2, 0), None, config, {"compile": False}, "cpu"
    )
    losses = task.losses(0, 1)
    torch.stack(list(losses.values())).sum().backward()
    assert drafter.ff.grad is not None
    assert (primary in task.models.values()) == (mode != FROZEN)
    return {name: float(loss.detach()) for name, loss in losses.items()}, primary


def test_a_frozen_primary_has_no_gradient() -> None:
    losses, primary = _gradients(FROZEN)
    assert set(losses) == {TANDEM} and all(p.grad is None for p in primary.parameters())


def test_the_drafters_loss_reaches_the_primary_through_its_representations_only() -> None:
    losses, primary = _gradients(DRAFTER_LOSS)
    assert set(losses) == {TANDEM}
    assert primary.layers[0].get_parameter("qkv").grad is not None
    assert primary.norm.grad is None  # behind the last tap: only logits would reach it, and a teacher has no gradient


def test_both_losses_add_up() -> None:
    losses, primary = _gradients(BOTH_LOSSES)
    assert set(losses) == {TANDEM, "primary"} and primary.norm.grad is not None
    alone, without = _gradients(DRAFTER_LOSS)
    assert losses[TANDEM] == alone[TANDEM]
    shared = primary.layers[0].get_parameter("qkv").grad
    assert not torch.equal(shared, without.layers[0].get_parameter("qkv").grad)


@pytest.mark.parametrize("kinds", [(PLAIN,), (TANDEM, PLAIN)])
def test_a_primary_is_trained_along_with_one_drafter_that_reads_it(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="along with one drafter"):
        DrafterConfig(kinds=kinds, train_primary=DRAFTER_LOSS)


def test_a_whole_slice_computes_what_its_source_does() -> None:
    source = small_decoder(3, 24, 0)
    same = sliced(source, DrafterShape(3, 24, 48, 2, 1), source.config)
    token_ids = torch.arange(12)[None]
    assert torch.equal(sequence_logits(same, token_ids), sequence_logits(source, token_ids))
    assert all(p.requires_grad for p in same.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_slice_takes_layers_channels_and_the_heads_that_share_a_key(family: str) -> None:
    config = DecoderConfig(
        model_type=family,
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=6,
        num_kv_heads=3,
        head_dim=8,
        qk_norm=family == "qwen3",
        max_position_embeddings=64,
    )
    source = Decoder(config).init_weights(0)
    small = sliced(source, DrafterShape(2, 16, 20, 2, 2), config, [1, 3])
    old, new = source.layer_weights[3], small.layer_weights[1]
    assert small.config.model_type == family and small.config.num_layers == 2
    queries, keys, values = old["qkv"][:16].split((48, 24, 24), 1)
    kept = torch.cat((queries[:, :8], queries[:, 16:24], keys[:, :16], values[:, :16]), 1)
    assert torch.equal(new["qkv"], kept)
    assert torch.equal(new["output"], torch.cat((old["output"][:8], old["output"][16:24]))[:, :16])
    gate, up = old["gate_up"][:16].chunk(2, 1)
    assert torch.equal(new["gate_up"], torch.cat((gate[:, :20], up[:, :20]), 1))
    assert torch.equal(new["down"], old["down"][:20, :16])
    assert torch.equal(small.embedding, source.embedding[:, :16])
    assert sequence_logits(small, torch.arange(8)[None]).isfinite().all()


def test_a_slice_spreads_its_layers_and_keeps_the_last() -> None:
    source = small_decoder(3, 24, 0)
    two = sliced(source, DrafterShape(2, 24, 48, 2, 1), source.config)
    assert torch.equal(two.layer_weights[1]["down"], source.layer_weights[2]["down"])


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        (DrafterShape(2, 64, 48, 2, 1), None, "width of 64"),
        (DrafterShape(2, 24, 48, 4, 1), None, "query heads a key/value head of 4"),
        (DrafterShape(2, 24, 48, 2, 1), (0, 3), "layers 0 to 2"),
        (DrafterShape(2, 24, 48, 2, 1), (0,), "expected 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(shape: DrafterShape, layers: tuple[int, ...] | None, message: str) -> None:
    source = small_decoder(3, 24, 0)
    with pytest.raises(ConfigError, match=message):
        sliced(source, shape, source.config, layers)


def test_sizes_left_open_are_those_of_the_source(tmp_path: Path) -> None:
    source = small_decoder(3, 24, 0)
    save_decoder(source, tmp_path / "source")
    assert chosen_shape({"num_layers": 2, "num_heads": None}, "") == DrafterShape(2)
    shape = chosen_shape({"num_layers": 2, "hidden_size": 16}, str(tmp_path / "source"))
    assert shape == DrafterShape(2, 16, 48, 2, 1)
    drafter = initial_decoder(
        shape, source.config, init_from=str(tmp_path / "source"), init_layers=init_layers_of("0,1")
    )
    assert torch.equal(drafter.layer_weights[0]["mlp_norm"], source.layer_weights[0]["mlp_norm"][:16])
    with pytest.raises(ConfigError, match="init-layers"):
        init_layers_of("first")
