"""Every family of primary with an MS of another family and width: trains a few steps, then drafts losslessly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.interfaces import LinkState
from tandem_serve.models.checkpoint import drafter_info, fingerprint, load_decoder, load_drafter, primary_info
from tandem_serve.training.corpus import Document
from tandem_serve.training.drafter_task import BOTH_LOSSES, FROZEN, PRIMARY, TANDEM, DrafterConfig
from tandem_serve.training.drafters import train_drafters
from tandem_serve.training.initial import DrafterShape
from tandem_serve.training.primary import BatchConfig
from tandem_serve.training.run_folder import RunFolder
from tandem_serve.training.trainer import TrainerConfig
from tandem_serve.types import SamplingParams
from tests.checkpoints import make_primary
from tests.engines import FAMILIES, Output, a_request, generate, reference_tokens

_TEXT = [Document("a", "for i in range(10):\n    print(i)\n" * 60)]
_NUM_STEPS = 60
_NAMES = list(FAMILIES)
_PAIRS = list(zip(_NAMES, _NAMES[1:] + _NAMES[:1], strict=True))  # no primary with an MS of its own family


def _train(tmp_path: Path, primary: Path, ms: Path, mode: str) -> Path:
    shape = DrafterShape(num_layers=2, hidden_size=16, intermediate_size=48, num_heads=4, num_kv_heads=2)
    config = DrafterConfig(shape=shape, train_primary=mode, init_from=str(ms), block_lengths=(1, 4))
    trainer = TrainerConfig(num_steps=_NUM_STEPS, precision="fp32", quiet=True)
    train_drafters(tmp_path / "run", primary, _TEXT, config, BatchConfig(24, 4), trainer)
    return tmp_path / "run"


def _draft(primary: Path, drafter: Path) -> list[Output]:
    """Completes a prompt with drafts, greedily and sampled; both equal the definition of decoding, token for token."""
    settings = DrafterEngineConfig()
    info = drafter_info(drafter, max_block_length=settings.max_block_length)
    factory = local_link_factory({"ms": DrafterEngine(load_drafter(drafter), info, settings)}, synchronous=True)
    config = PrimaryEngineConfig(block_length=3, draft_timeout_s=30.0)
    engine = TorchPrimary(load_decoder(primary), primary_info(primary), config, link_factory=factory)
    engine.set_drafters(["ms"])
    for _ in range(100):
        if dict(engine.status().drafters).get("ms") == LinkState.READY.value:
            break
        engine.step()
    prompt = range(40, 60)
    requests = [a_request("greedy", prompt, 30), a_request("sampled", prompt, 30, SamplingParams(0.8, seed=3))]
    outputs = generate(engine, requests)
    engine.close()
    for request in requests:
        output = outputs[request.request_id]
        assert output.token_ids == reference_tokens(load_decoder(primary), request)
        assert len(output.token_ids) == 30 and output.num_draft_tokens > 0
    return list(outputs.values())


@pytest.mark.parametrize(("ml", "ms"), _PAIRS)
def test_a_pair_of_two_families_trains_and_drafts_losslessly(ml: str, ms: str, tmp_path: Path) -> None:
    primary = make_primary(tmp_path / "ml", config=FAMILIES[ml])
    source = make_primary(tmp_path / "ms", seed=5, config=FAMILIES[ms])
    run = _train(tmp_path, primary, source, FROZEN)
    losses = [record["losses"][TANDEM] for record in RunFolder(run).read_log()]
    assert losses[-1] < losses[0] - 0.5, losses
    drafter = load_drafter(run / TANDEM)
    assert drafter.decoder.config.model_type == FAMILIES[ms].model_type
    assert drafter.decoder.config.hidden_size == 16
    _draft(primary, run / TANDEM)


def test_a_primary_that_was_trained_along_is_the_one_its_drafter_belongs_to(tmp_path: Path) -> None:
    primary = make_primary(tmp_path / "ml", config=FAMILIES["qwen2"])
    run = _train(tmp_path, primary, primary, BOTH_LOSSES)
    losses = [record["losses"] for record in RunFolder(run).read_log()]
    assert all(losses[-1][name] < losses[0][name] - 0.5 for name in (TANDEM, PRIMARY))
    drafter = load_drafter(run / TANDEM)
    assert drafter.config.primary_fingerprint == fingerprint(run / PRIMARY) != fingerprint(primary)
    trained, before = load_decoder(run / PRIMARY), load_decoder(primary)
    assert not torch.equal(trained.embedding, before.embedding)
    greedy, _ = _draft(run / PRIMARY, run / TANDEM)
    assert greedy.num_accepted_tokens > 0  # both have learnt the same lines
