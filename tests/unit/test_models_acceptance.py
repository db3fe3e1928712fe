"""The router MLP's file: what was saved comes back, and nothing damaged is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.draft_scores import AcceptanceScorer
from tandem_serve.errors import CheckpointError
from tandem_serve.models.acceptance import (
    FORMAT,
    ROUTER_FILE,
    AcceptanceConfig,
    AcceptanceModel,
    draft_features,
    load_acceptance,
    save_acceptance,
)
from tandem_serve.models.checkpoint import drafter_acceptance, fingerprint
from tandem_serve.types import PolicyName, SamplingParams
from tests.checkpoints import CONFIG, make_drafter, make_primary
from tests.engines import tiny_primary

METADATA = {"format": FORMAT, "drafter_fingerprint": "f", "top_k": "2", "threshold.router": "0.5"}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[AcceptanceModel, Path]:
    torch.manual_seed(0)
    model = AcceptanceModel(AcceptanceConfig(CONFIG.hidden_size, top_k=2, hidden_size=8))
    model.thresholds = {PolicyName.ROUTER: 0.625, PolicyName.OPTIMAL: 0.25}
    save_acceptance(model, tmp_path, "f")
    return model, tmp_path


def test_what_was_saved_scores_the_same(saved: tuple[AcceptanceModel, Path]) -> None:
    model, folder = saved
    loaded = load_acceptance(folder, CONFIG.hidden_size, "f")
    assert loaded.config == model.config
    assert loaded.thresholds == model.thresholds
    decoder = tiny_primary()[0]
    logits = 6 * torch.randn(5, CONFIG.vocab_size, generator=torch.Generator().manual_seed(1))
    drafts = choose_token_ids(logits, SamplingRows.from_params([(SamplingParams(temperature=0), 0)] * 5))
    with torch.inference_mode():
        for policy in (PolicyName.ENTROPY, PolicyName.ROUTER, PolicyName.OPTIMAL):
            ours, theirs = (AcceptanceScorer(m, decoder)(policy, logits, drafts) for m in (model, loaded))
            assert ours == theirs
            assert len(set(ours)) == 5 and all(0 < score < 1 for score in ours)


def test_features() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1, 0.0]]).log()
    found = draft_features(logits, logits[:, 1], torch.tensor([True]), 2)
    assert found.top_ids.tolist() == [[0, 1]]
    torch.testing.assert_close(found.top_probs, torch.tensor([[0.7, 0.2]]))
    torch.testing.assert_close(found.draft_logprob.exp(), torch.tensor([0.2]))
    assert float(found.entropy) == pytest.approx(0.8018, abs=1e-4)


def test_the_quick_model_begins_as_the_drafter_s_own_odds() -> None:
    model = AcceptanceModel(AcceptanceConfig(8))
    probs = torch.tensor([0.01, 0.5, 0.9])
    for is_sampled in (True, False):
        found = model.quick(probs.log(), torch.full((3,), is_sampled)).sigmoid().detach()
        torch.testing.assert_close(found, probs)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], object], str]] = {
    "another format": (lambda tensors, metadata: metadata.update(format="tandem-router-0"), "format"),
    "another drafter": (lambda tensors, metadata: metadata.update(drafter_fingerprint="g"), "made for the drafter"),
    "no top_k": (lambda tensors, metadata: metadata.pop("top_k"), "top_k"),
    "top_k no number": (lambda tensors, metadata: metadata.update(top_k="many"), "damaged"),
    "top_k too large": (lambda tensors, metadata: metadata.update(top_k="1000"), "damaged"),
    "another top_k": (lambda tensors, metadata: metadata.update(top_k="3"), "expected"),
    "a threshold above 1": (lambda tensors, metadata: metadata.update({"threshold.router": "2"}), "within 0..1"),
    "a threshold of NaN": (lambda tensors, metadata: metadata.update({"threshold.router": "nan"}), "within 0..1"),
    "a tensor too few": (lambda tensors, metadata: tensors.pop("input.bias"), "expected"),
    "a tensor too many": (lambda tensors, metadata: tensors.update(more=torch.zeros(1)), "expected"),
    "a NaN": (lambda tensors, metadata: tensors["input.bias"].fill_(torch.nan), "finite"),
    "whole numbers": (lambda tensors, metadata: tensors.update({"input.bias": torch.zeros(8).long()}), "finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(saved: tuple[AcceptanceModel, Path], damage: str) -> None:
    file = saved[1] / ROUTER_FILE
    tensors, metadata = load_file(file), dict(METADATA)
    change, message = DAMAGE[damage]
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_acceptance(saved[1], CONFIG.hidden_size, "f")
    assert str(file) in str(caught.value)


def test_a_file_that_is_none_is_refused(saved: tuple[AcceptanceModel, Path]) -> None:
    (saved[1] / ROUTER_FILE).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_acceptance(saved[1], CONFIG.hidden_size, "f")


def test_a_drafter_of_another_width_is_refused(saved: tuple[AcceptanceModel, Path]) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        load_acceptance(saved[1], CONFIG.hidden_size + 1, "f")


def test_it_lies_beside_its_drafter_and_does_not_change_the_drafter_s_identity(tmp_path: Path) -> None:
    folder = make_drafter(tmp_path / "drafter", make_primary(tmp_path / "primary"))
    assert drafter_acceptance(folder) is None
    identity = fingerprint(folder)
    save_acceptance(AcceptanceModel(replace(AcceptanceConfig(CONFIG.hidden_size), hidden_size=4)), folder, identity)
    assert fingerprint(folder) == identity
    found = drafter_acceptance(folder)
    assert found is not None and found.config.hidden_size == 4
