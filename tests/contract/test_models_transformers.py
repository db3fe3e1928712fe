"""transformers is the oracle: same checkpoints, same logits, whichever way the tokens are fed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

from tandem_serve.models.checkpoint import fingerprint, load_decoder, load_drafter, save_decoder, save_drafter
from tandem_serve.models.decoder import causal_attention
from tests.dense_cache import DenseCache

logging.disable_progress_bar()

NUM_TOKENS = 48
TOLERANCE = 1e-4
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied-biased": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 12}),
    "llama-multi-head": (LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "mistral": (MistralConfig, {"sliding_window": 7}),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-biased": (Qwen3Config, {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}
SCALINGS: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 24},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn-given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "attention_factor": 1.5,
        "truncate": False,
    },
}
CASES = {
    **FAMILIES,
    **{
        f"rope-{name}": (LlamaConfig, {"rope_parameters": {"rope_theta": 1e4, **scaling}})
        for name, scaling in SCALINGS.items()
    },
}


@dataclass(frozen=True)
class Oracle:
    """A checkpoint written by transformers, and what transformers computes from it."""

    folder: Path
    model: Any
    token_ids: Tensor  # [2, NUM_TOKENS]
    logits: Tensor  # [2, NUM_TOKENS, V]
    hidden_states: tuple[Tensor, ...]  # tap 0 .. L - 1, then the last *after* the final norm


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    config_class, overrides = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **overrides})).eval().requires_grad_(False)
    for parameter in model.parameters():  # far from their initial values: a norm or bias that is left out must show
        parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
    model.save_pretrained(folder)
    token_ids = torch.randint(0, SHAPE["vocab_size"], (2, NUM_TOKENS))
    output = model(token_ids, output_hidden_states=True)
    assert output.logits.abs().max() > 1  # else agreement would mean little
    return Oracle(folder, model, token_ids, output.logits, output.hidden_states)


def test_prefill_logits_and_taps(oracle: Oracle) -> None:
    decoder = load_decoder(oracle.folder)
    layers = decoder.config.num_layers
    attend = causal_attention(decoder.config, NUM_TOKENS)
    output = decoder(oracle.token_ids, torch.arange(NUM_TOKENS), attend, taps=tuple(range(layers)))
    torch.testing.assert_close(decoder.logits(output.hidden), oracle.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.hidden, oracle.hidden_states[layers], atol=TOLERANCE, rtol=0)
    for tap, states in enumerate(output.taps):
        torch.testing.assert_close(states, oracle.hidden_states[tap], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunked_prefill_and_decode_with_a_cache(oracle: Oracle, chunk: int) -> None:
    decoder = load_decoder(oracle.folder)
    cache = DenseCache(decoder.config, NUM_TOKENS)
    with torch.inference_mode():
        hidden = [
            decoder(oracle.token_ids[0, positions], positions, cache.attend(positions)).hidden
            for positions in torch.arange(NUM_TOKENS).split(chunk)
        ]
        logits = decoder.logits(torch.cat(hidden))
    torch.testing.assert_close(logits, oracle.logits[0], atol=TOLERANCE, rtol=0)


def test_saved_again_it_loads_in_transformers(oracle: Oracle, tmp_path: Path) -> None:
    save_decoder(load_decoder(oracle.folder), tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        logits = model(oracle.token_ids).logits
    torch.testing.assert_close(logits, oracle.logits, atol=0, rtol=0)
    assert fingerprint(tmp_path / "again") == fingerprint(oracle.folder)


def test_shards_load_and_fingerprint_as_one_file_does(oracle: Oracle, tmp_path: Path) -> None:
    oracle.model.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sharded, whole = load_decoder(tmp_path), load_decoder(oracle.folder)
    assert sharded.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in sharded.state_dict().items())
    assert fingerprint(tmp_path) == fingerprint(oracle.folder)


def test_older_spelling_of_rope_parameters(oracle: Oracle, tmp_path: Path) -> None:
    config = json.loads((oracle.folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").hardlink_to(oracle.folder / "model.safetensors")
    assert load_decoder(tmp_path).config == load_decoder(oracle.folder).config


def test_bfloat16_follows_transformers_in_bfloat16(oracle: Oracle) -> None:
    decoder = load_decoder(oracle.folder, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(oracle.folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        attend = causal_attention(decoder.config, NUM_TOKENS)
        ours = decoder.logits(decoder(oracle.token_ids, torch.arange(NUM_TOKENS), attend).hidden)
        theirs = model(oracle.token_ids).logits
    assert ours.dtype == torch.bfloat16
    ours_error, theirs_error = ((x.float() - oracle.logits).square().mean().sqrt() for x in (ours, theirs))
    assert ours_error < 1.3 * theirs_error  # rounding differs; its size must not


def test_a_plain_drafter_is_an_ordinary_checkpoint(oracle: Oracle, tmp_path: Path) -> None:
    save_drafter(load_drafter(oracle.folder), tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(oracle.token_ids).logits, oracle.logits, atol=0, rtol=0)
