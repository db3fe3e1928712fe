"""Checkpoints that were made to do harm: each is refused, quickly, with an error that says why."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from tandem_serve.errors import CheckpointError
from tandem_serve.models.checkpoint import load_decoder, load_drafter, load_tokenizer, primary_info
from tandem_serve.models.folder import read_json
from tandem_serve.models.pairs import DEMO, pair_folder
from tests.checkpoints import make_primary


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_primary(tmp_path_factory.mktemp("models") / "primary")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "primary"))


def refusal(model: Path) -> str:
    """What every way of reading the folder says; all must refuse."""
    messages = set()
    for read in (load_decoder, load_drafter, load_tokenizer, primary_info):
        with pytest.raises(CheckpointError) as caught:
            read(model)
        messages.add(str(caught.value))
    assert len(messages) == 1, messages
    return messages.pop()


class Bomb:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._target),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "model.pt", "state.pkl"])
def test_a_pickle_beside_good_weights(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert name in refusal(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_under_another_name_is_not_run(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(model)
        load_decoder(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "extra"])
def test_a_link_out_of_the_folder(model: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    assert f"{name} is a link out of the checkpoint's folder" in refusal(model)


def test_links_within_a_folder_or_the_hubs_cache_are_as_good_as_files(model: Path, tmp_path: Path) -> None:
    (model / "config.json").rename(model / "real")
    (model / "config.json").symlink_to("real")
    load_decoder(model)
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(model, snapshot)
    (snapshot / "model.safetensors").rename(repository / "blobs" / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    load_decoder(snapshot)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../primary/tokenizer.json")
    assert "tokenizer.json is a link out of" in refusal(snapshot)


def test_what_would_never_end_when_read(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    os.mkfifo(model / "chat_template.jinja")
    assert "neither a file nor a folder" in refusal(model)


def test_a_text_file_of_terabytes(model: Path) -> None:
    with (model / "tokenizer_config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "tokenizer_config.json has 1099511627776 bytes" in refusal(model)


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings", "intermediate_size"]
)
@pytest.mark.parametrize("value", [2**40, 2**4000, -1, 1.5, "many"])
def test_an_absurd_config(model: Path, field: str, value: Any) -> None:
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    for read in (load_decoder, load_drafter, primary_info):
        with pytest.raises(CheckpointError, match=rf"config\.json: {field} = "):
            read(model)


def test_a_config_of_all_brackets(model: Path) -> None:
    (model / "config.json").write_text('{"a":' * 20_000)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_decoder(model)


def replace_all(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, Any]:
    return {"normalizers": [{"type": "Replace", "pattern": pattern, "content": content}] * times, "type": "Sequence"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": replace_all({"String": "a"}, "aa", 40)}, "the normalizer makes a text up to 1.1e"),
        ({"normalizer": replace_all({"Regex": ""}, "a", 40)}, "the normalizer makes a text up to 1.1e"),
        ({"normalizer": replace_all({"String": ""}, "a", 40)}, "the normalizer makes a text up to 1.1e"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 20}}, "up to 1.1e"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "'Precompiled' is not supported"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "prepends a book"),
        ({"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}}, "the decoder makes"),
        ({"added_tokens": [{"id": 5, "content": "a" * 10**6}]}, "a token of 1000000 characters"),
        ({"normalizer": "all of it"}, "damaged"),
        ({"model": {"vocab": 5}}, "damaged"),
        ({"model": None}, "damaged"),
    ],
)
def test_a_tokenizer_bomb(model: Path, changes: dict[str, Any], message: str) -> None:
    content = read_json(model / "tokenizer.json")
    (model / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        load_tokenizer(model)
    assert message in str(caught.value)


def test_a_tokenizer_that_adds_a_book_of_tokens(model: Path) -> None:
    content = read_json(model / "tokenizer.json")
    flood = {"id": "flood", "ids": [0] * 10**5, "tokens": ["<|endoftext|>"] * 10**5}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "flood", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"flood": flood},
    }
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="adds 100000 tokens to every prompt"):
        load_tokenizer(model)


def test_padding_to_terabytes_is_put_aside(model: Path) -> None:
    content = read_json(model / "tokenizer.json")
    plain = load_tokenizer(model).encode("def fib(n):").ids
    content["padding"] = {
        "strategy": {"Fixed": 2**40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    content["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(model).encode("def fib(n):").ids == plain
    assert len(plain) > 1


def test_tokenizers_as_they_are_made_are_taken(model: Path) -> None:
    content = read_json(model / "tokenizer.json")
    llama = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    for normalizer in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": llama}):
        (model / "tokenizer.json").write_text(json.dumps({**content, "normalizer": normalizer}))
        load_tokenizer(model)
    load_tokenizer(pair_folder(DEMO) / "primary")
