"""Peers: what each may see at which draft, and that they come back from disk as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem_serve.errors import CheckpointError
from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.training.data import TokenWindows
from tandem_serve.training.drafter_task import DrafterConfig, DrafterTask
from tandem_serve.training.evaluate import OwnTexts, draft_hits, drafting_figures
from tandem_serve.training.initial import DrafterShape
from tandem_serve.training.peers.catalog import PEERS, build_peer, load_any, load_peer, runs_of, save_peer
from tandem_serve.training.peers.peer import Peer
from tandem_serve.training.peers.prompt_lookup import PromptLookup, lookup
from tandem_serve.training.unroll import unroll
from tandem_serve.training.views import primary_view
from tests.small_models import small_decoder

_SHAPE = DrafterShape(2, 16, 32, 2, 1)


def _peer(kind: str, primary: Decoder) -> Peer:
    """A peer whose every weight matters: none is left at zero."""
    peer = build_peer(kind, primary, _SHAPE, longest_block=4, seed=1)
    random = torch.Generator().manual_seed(2)
    for parameter in peer.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return peer.requires_grad_(False)


def _steps(primary: Decoder, peer: Peer, token_ids: Tensor, representations: Tensor | None = None) -> list[Tensor]:
    if representations is None:
        representations = primary_view(primary, token_ids, peer.taps).representations
    return list(unroll(peer, token_ids, representations, 4))


@pytest.mark.parametrize("kind", PEERS)
def test_a_draft_depends_on_verified_states_and_tokens_before_it_only(kind: str) -> None:
    """A block that opens at n may read the primary's states before n, and tokens up to its own last."""
    primary, opening = small_decoder(3, 24, 0), 6
    peer = _peer(kind, primary)
    token_ids = torch.randint(37, (1, 14), generator=torch.Generator().manual_seed(1))
    representations = primary_view(primary, token_ids, peer.taps).representations
    before = _steps(primary, peer, token_ids, representations)
    spoilt = representations.clone()
    spoilt[:, opening:] = 7.0  # what is not verified when the block opens
    unseen = token_ids.clone()
    for step, logits in enumerate(before):
        unseen[:, :] = token_ids
        unseen[:, opening + step + 1 :] = 0
        after = _steps(primary, peer, unseen, spoilt)[step]
        assert torch.allclose(after[:, opening + step], logits[:, opening + step], atol=1e-5)
        touched = representations.clone()
        touched[:, opening - 1] += torch.randn(representations.shape[-1], generator=torch.Generator().manual_seed(3))
        reacts = _steps(primary, peer, token_ids, touched)[step][:, opening + step] - logits[:, opening + step]
        needed = kind != "deep-tandem" or step == 3  # the sketch of position n + 3 comes from n - 1
        assert (reacts.abs().max() > 1e-4) == needed


def test_an_eagle_drafter_goes_on_from_its_own_output() -> None:
    """Step by step on one block, each from whole passes: own features inside it, the primary's before it."""
    primary, opening = small_decoder(3, 24, 0), 5
    peer = _peer("eagle", primary)
    token_ids = torch.randint(37, (1, 10), generator=torch.Generator().manual_seed(1))
    representations = primary_view(primary, token_ids, peer.taps).representations
    steps = _steps(primary, peer, token_ids, representations)
    features = peer._normalise(representations).flatten(-2) @ peer.fuse
    previous = torch.cat((torch.zeros_like(features[:, :1]), features[:, :-1]), 1)
    for step in range(4):
        end = opening + step + 1
        x = torch.cat((peer.decoder.embed(token_ids[:, :end]), previous[:, :end]), -1) @ peer.mix
        hidden = peer.decoder.run_layers(x, torch.arange(end), causal_attention(peer.decoder.config, end)).hidden
        assert torch.allclose(peer.decoder.logits(hidden)[:, -1], steps[step][:, end - 1], atol=1e-4)
        previous = torch.cat((previous[:, :end], hidden[:, -1:], previous[:, end + 1 :]), 1)


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_is_saved_in_bf16_and_loaded(kind: str, tmp_path: Path) -> None:
    primary = small_decoder(3, 24, 0)
    peer = _peer(kind, primary)
    for parameter in peer.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_peer(peer, tmp_path)
    found = load_any(str(tmp_path), primary)
    token_ids = torch.arange(12)[None]
    for ours, theirs in zip(_steps(primary, peer, token_ids), _steps(primary, found, token_ids), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match="not a peer"):
        load_peer(tmp_path, small_decoder(3, 40, 0))


@pytest.mark.parametrize("kind", PEERS)
def test_a_peers_loss_is_finite_and_reaches_its_weights(kind: str) -> None:
    primary = small_decoder(3, 24, 0)
    peer = build_peer(kind, primary, _SHAPE, longest_block=4)
    stream = np.random.default_rng(0).integers(37, size=400).astype(np.int32)
    config = DrafterConfig(kinds=(kind,), cross_entropy_share=0.0)
    task = DrafterTask(primary, {kind: peer}, TokenWindows(stream, 16, 2, 0), None, config, {"compile": False}, "cpu")
    loss = task.losses(0, 1)[kind]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in peer.parameters())
    assert all(p.grad is None for p in primary.parameters())


def test_prompt_lookup_copies_what_followed_the_longest_known_suffix() -> None:
    assert lookup([1, 2, 3, 9, 5, 1, 2, 3], 3) == [9, 5, 1]
    assert lookup([7, 3, 4, 1, 3, 8, 2, 3], 2) == [8, 2]  # the latest of the two
    assert lookup([1, 2, 3], 4) == []
    assert lookup([5, 5], 4) == [5]


def test_prompt_lookup_is_measured_by_acceptance() -> None:
    primary = small_decoder(3, 24, 0)
    text = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 9]])
    hits = draft_hits(primary, PromptLookup(), OwnTexts(text, 4), 4)
    figures = drafting_figures([(hits, 4)], [3], runs_of(PromptLookup()))["block_lengths"]["3"]
    assert figures["num_blocks"] == 2 and figures["accepted_per_block"] == 2.5
    assert figures["drafter_runs_per_response"] == 0 and figures["primary_runs_per_response"] == 3
