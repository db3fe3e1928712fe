"""Checkpoint folders: what is refused and how it is said, what names a model, what a crash leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tandem_serve.errors import CheckpointError
from tandem_serve.models import checkpoint
from tandem_serve.models.checkpoint import load_decoder, load_drafter, save_decoder, save_drafter
from tandem_serve.models.config import DecoderConfig
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.rope import rope_table
from tandem_serve.models.tandem import TandemDrafter
from tests.checkpoints import CONFIG, END_OF_TEXT_ID, VOCAB_SIZE, make_drafter, make_plain_drafter, make_primary

HF = CONFIG.to_hf()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    primary = make_primary(folder / "primary")
    return primary, make_drafter(folder / "drafter", primary, layer_map=(3, 1, 3))


@pytest.fixture
def primary(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A primary of one's own, to damage."""
    return Path(shutil.copytree(pair[0], tmp_path / "primary"))


@pytest.fixture
def drafter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "drafter"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ------------------------------------------------------------------ round trips


def test_a_tandem_drafter_comes_back_as_it_was(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = load_drafter(pair[1])
    save_drafter(first, tmp_path / "again", tokenizer_from=pair[1])
    second = load_drafter(tmp_path / "again")
    assert isinstance(first, TandemDrafter)
    assert isinstance(second, TandemDrafter)
    assert second.config == first.config
    assert second.taps == (1, 3)
    assert second.decoder.config == first.decoder.config
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    assert checkpoint.fingerprint(tmp_path / "again") == checkpoint.fingerprint(pair[1])
    names = set(load_file(pair[1] / "model.safetensors"))
    assert {"tandem.ff.0.weight", "tandem.ff.2.weight", "model.layers.2.mlp.down_proj.weight"} <= names


def test_loaded_models_are_ready_to_serve_in_the_dtype_asked_for(pair: tuple[Path, Path]) -> None:
    for model in (load_decoder(pair[0], dtype=torch.bfloat16), load_drafter(pair[1], dtype=torch.bfloat16)):
        assert not model.training
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}


def test_a_folder_without_tandem_block_is_a_plain_drafter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert isinstance(load_drafter(make_plain_drafter(tmp_path / "plain", pair[0])), Decoder)


def test_tokenizer_files_travel_with_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    save_decoder(load_decoder(pair[0]), tmp_path / "copy", tokenizer_from=pair[0])
    tokenizer = checkpoint.load_tokenizer(tmp_path / "copy")
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.decode(tokenizer.encode("déf fib(n):\n").ids) == "déf fib(n):\n"
    assert checkpoint.tokenizer_hash(tmp_path / "copy") == checkpoint.tokenizer_hash(pair[0])


def test_infos_say_what_the_peers_compare(pair: tuple[Path, Path], tmp_path: Path) -> None:
    primary = checkpoint.primary_info(pair[0])
    drafter = checkpoint.drafter_info(pair[1], max_block_length=8, max_model_len=100)
    plain = checkpoint.drafter_info(make_plain_drafter(tmp_path / "plain", pair[0]), max_block_length=8, model="p")
    assert (primary.model, primary.vocab_size, primary.hidden_size, primary.num_layers) == ("primary", 288, 32, 3)
    assert primary.max_model_len == CONFIG.max_position_embeddings
    assert drafter.primary_fingerprint == primary.fingerprint == checkpoint.fingerprint(pair[0])
    assert drafter.tokenizer_hash == primary.tokenizer_hash == plain.tokenizer_hash
    assert (drafter.taps, drafter.primary_hidden_size, drafter.max_model_len) == ((1, 3), 32, 100)
    assert (plain.taps, plain.primary_fingerprint, plain.primary_hidden_size, plain.model) == ((), "", 0, "p")
    assert len({primary.fingerprint, drafter.fingerprint, plain.fingerprint}) == 3


def test_eos_ids_come_from_the_generation_config_first(primary: Path) -> None:
    assert checkpoint.eos_token_ids(primary) == (END_OF_TEXT_ID,)
    (primary / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert checkpoint.eos_token_ids(primary) == (5, 7)
    (primary / "generation_config.json").write_text("{}")
    edit_config(primary, eos_token_id=None)
    assert checkpoint.eos_token_ids(primary) == ()


# ------------------------------------------------------------------ identity


def test_fingerprint_is_of_the_weights_and_not_of_the_folder(primary: Path, tmp_path: Path) -> None:
    before = checkpoint.fingerprint(primary)
    os.utime(primary / "model.safetensors", (0, 0))
    edit_config(primary, transformers_version="9.9", _name_or_path="/elsewhere")
    moved = Path(shutil.move(primary, tmp_path / "moved"))
    assert checkpoint.fingerprint(moved) == before


def test_fingerprint_changes_with_one_weight_and_with_the_shape(primary: Path) -> None:
    before = checkpoint.fingerprint(primary)
    tensors = load_file(primary / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] += 1
    save_file(tensors, primary / "model.safetensors", metadata={"format": "pt"})
    changed = checkpoint.fingerprint(primary)
    edit_config(primary, rope_theta=20_000.0)
    assert len({before, changed, checkpoint.fingerprint(primary)}) == 3


def test_fingerprint_samples_every_part_of_a_large_tensor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF))
    tensor = torch.zeros(1_000_003)

    def fingerprint() -> str:
        save_file({"big": tensor}, tmp_path / "model.safetensors")
        return checkpoint.fingerprint(tmp_path)

    seen = {fingerprint()}
    for part in tensor[:1_000_000].view(16, -1):  # as training does: many weights of each part change
        part += 1
        seen.add(fingerprint())
    assert len(seen) == 17


def test_tokenizer_hash_ignores_padding_but_not_the_vocabulary(primary: Path) -> None:
    before = checkpoint.tokenizer_hash(primary)
    tokenizer = checkpoint.load_tokenizer(primary)
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(primary / "tokenizer.json"))
    assert checkpoint.tokenizer_hash(primary) == before
    tokenizer.add_tokens(["new"])
    tokenizer.save(str(primary / "tokenizer.json"))
    assert checkpoint.tokenizer_hash(primary) != before


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor = 'x'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "out of range"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"vocab_size": "288"}, "vocab_size = '288'"),
        ({"num_key_value_heads": 3}, "share"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"eos_token_id": "stop"}, "'stop' is not a token id"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "unexpected tensors, the first: model.layers.2"),
        ({"tie_word_embeddings": False, "attention_bias": True}, "bias is missing"),
    ],
)
def test_a_config_that_we_do_not_compute_is_named(primary: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(primary, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_decoder(primary)
    assert message in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.fixed_dictionaries(
    {"rope_type": JSON | st.sampled_from(["linear", "yarn", "llama3"])},
    optional={
        name: JSON | st.floats(0, 100)
        for name in (
            *("type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
            *("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
        )
    },
)
FIELDS = [*HF, "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "rope_parameters"]


@settings(max_examples=200)
@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    rope=st.none() | ROPE,
)
def test_whatever_config_json_holds_it_is_read_or_refused(
    model_type: str, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    try:
        config = DecoderConfig.from_hf({**HF, "model_type": model_type, "rope_scaling": rope, **changes})
    except CheckpointError as error:
        assert str(error)
    else:
        assert DecoderConfig.from_hf(config.to_hf()) == config
        assert rope_table(config.rope, config.head_dim, 4).isfinite().all()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"layer_map": [3, 3]}, "2 entries for 3 layers"),
        ({"layer_map": [3, 3, 4]}, "layers the primary has not"),
        ({"layer_map": [[1, 3], 3, 3]}, "equally many taps"),
        ({"layer_map": [[1, 3], [1, 3], [2, 3]]}, "tandem.ff.0.weight has shape"),
        ({"layer_map": "last"}, "damaged tandem block"),
        ({"layer_map": None}, "damaged tandem block"),
        ({"primary_hidden_size": 16}, "tandem.ff.0.weight has shape"),
        ({"primary_hidden_size": 10**12}, "tandem.ff.0.weight has shape"),
    ],
)
def test_a_damaged_tandem_block_is_named(drafter: Path, block: dict[str, Any], message: str) -> None:
    tandem = json.loads((drafter / "config.json").read_text())["tandem"]
    edit_config(drafter, tandem={**tandem, **block})
    with pytest.raises(CheckpointError) as caught:
        load_drafter(drafter)
    assert message in str(caught.value)


def test_a_tandem_drafter_is_no_primary(drafter: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected tensors, the first: tandem\.ff\.0\.weight"):
        load_decoder(drafter)


def test_pickled_weights_are_never_read(primary: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (primary / "model.safetensors").unlink()
    torch.save(Bomb(), primary / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load_decoder(primary)
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_files_are_named(primary: Path) -> None:
    weights = primary / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load_decoder(primary)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_decoder(primary)
    (primary / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_decoder(primary)
    (primary / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load_decoder(primary)
    (primary / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_decoder(primary)
    (primary / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        checkpoint.load_tokenizer(primary)
    (primary / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        checkpoint.load_tokenizer(primary)


def test_whole_numbers_are_no_weights(primary: Path) -> None:
    tensors = load_file(primary / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
    save_file(tensors, primary / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is I64; supported: BF16, F16, F32"):
        load_decoder(primary)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"model.norm.weight": "../primary/model.safetensors"}}, "not a safetensors file of this"),
        ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "not a safetensors file of this"),
        ({"weight_map": {"model.norm.weight": "weights.bin"}}, "not a safetensors file of this"),
        ({"weight_map": {"model.norm.weight": "gone.safetensors"}}, "not a readable safetensors file"),
        ({"weight_map": {"model.norm.weight": 3}}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_stays_in_its_folder(primary: Path, index: dict[str, Any], message: str) -> None:
    (primary / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_decoder(primary)


# ------------------------------------------------------------------ writing, and where models come from


def test_a_write_that_fails_leaves_the_old_folder_alone(primary: Path) -> None:
    before = checkpoint.fingerprint(primary)
    with pytest.raises(RuntimeError, match="full"), checkpoint.atomic_folder(primary) as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError("the disk is full")
    assert checkpoint.fingerprint(primary) == before
    assert os.listdir(primary.parent) == ["primary"]


def test_a_write_replaces_the_folder_as_a_whole(primary: Path) -> None:
    (primary / "stale.txt").write_text("from before")
    save_decoder(Decoder(CONFIG).init_weights(9), primary)
    assert not (primary / "stale.txt").exists()
    assert os.listdir(primary.parent) == ["primary"]
    load_decoder(primary)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "/nowhere", "../up/there", "./here"])
def test_what_is_neither_folder_nor_hub_id_is_refused_offline(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_decoder(name)


def test_a_hub_id_is_looked_up_in_the_hubs_cache(pair: tuple[Path, Path], tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--someone--tiny"
    commit = "0123456789012345678901234567890123456789"
    (repo / "snapshots").mkdir(parents=True)
    shutil.copytree(pair[0], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    program = (
        "from tandem_serve.errors import CheckpointError\n"
        "from tandem_serve.models.checkpoint import *\n"
        "print(primary_info('someone/tiny').model, fingerprint('someone/tiny@main'))\n"
        "try: load_decoder('someone/else')\n"
        "except CheckpointError as error: print('refused:', error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    model_line, refusal = done.stdout.splitlines()[:2]
    assert model_line == f"someone/tiny {checkpoint.fingerprint(pair[0])}"
    assert refusal.startswith("refused: someone/else: no such folder, and not to be had from the hub")
