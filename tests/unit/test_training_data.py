"""Corpus, tokenizer and batches: what a run sees is fixed by its arguments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem_serve.cli_train import _origin_of_text
from tandem_serve.errors import ConfigError
from tandem_serve.training.corpus import (
    STDLIB_HELD_OUT,
    Document,
    corpus_hash,
    read_documents,
    split_held_out,
    stdlib_folder,
)
from tandem_serve.training.data import TokenWindows, block_index, encode_documents, parse_block_lengths
from tandem_serve.training.held_out import evaluation_documents, heldout_prompts, read_held_out, write_held_out
from tandem_serve.training.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, save_tokenizer, train_tokenizer

_TEXT = "def add(first, second):\n    return first + second  # é ☃\n\n" * 40


def test_a_folder_is_read_in_name_order_without_its_caches(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "image.png").write_text("no text")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "c.py").write_text("c")
    assert [d.name for d in read_documents(str(tmp_path))] == ["a.txt", "b.py"]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text"):
        read_documents(str(tmp_path))


def test_a_source_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_place"):
        read_documents("./no_such_place")


def test_every_held_out_module_exists_in_this_interpreter() -> None:
    assert [name for name in STDLIB_HELD_OUT if not (stdlib_folder() / name).is_file()] == []


def test_held_out_documents_are_not_trained_on() -> None:
    documents = [Document(f"{i}.py", f"text {i}") for i in range(200)]
    training, held_out = split_held_out(documents, ["3.py", "7.py"])
    assert [d.name for d in held_out] == ["3.py", "7.py"] and len(training) == 198
    training, held_out = split_held_out(documents, None, fraction=0.2)
    assert 15 < len(held_out) < 65 and not {d.name for d in training} & {d.name for d in held_out}
    fewer = split_held_out(documents[50:], None, fraction=0.2)[1]
    assert {d.name for d in fewer} <= {d.name for d in held_out}  # the choice does not move when documents go


@pytest.mark.parametrize("count", [1, 3])
def test_few_documents_give_their_ends(count: int) -> None:
    documents = [Document(str(i), f"{i}" * 90 + "y" * 10) for i in range(count)]
    training, held_out = split_held_out(documents, None, fraction=0.1)
    assert [d.text for d in training] == [f"{i}" * 90 for i in range(count)]
    assert [d.text for d in held_out] == ["y" * 10] * count


@pytest.mark.parametrize(("trained_on", "there_are"), [(15, 21), (25, 18), (1, 1), (30, 30)])
def test_what_was_held_out_stays_so_when_documents_come_or_go(tmp_path: Path, trained_on: int, there_are: int) -> None:
    """What training wrote decides, not how many documents there are now."""
    data, primary = tmp_path / "data", tmp_path / "primary"
    data.mkdir()
    primary.mkdir()

    def write(count: int) -> list[Document]:
        for file in data.iterdir():
            file.unlink()
        for i in range(count):
            (data / f"{i}.txt").write_text(f"text {i} " * 100)
        return read_documents(str(data))

    training, held_out = split_held_out(write(trained_on), None)
    details = _origin_of_text(str(data), training, held_out)
    (primary / "provenance.json").write_text(json.dumps(details))
    write(there_are)
    seen = {d.name: d.text for d in training}
    for document in evaluation_documents("heldout", "prompt", primary):
        if document.name in seen:  # its end, then, behind what was trained on
            assert seen[document.name] + document.text == f"text {document.name.split('.')[0]} " * 100


def test_something_is_held_out_of_any_documents() -> None:
    for count in range(20, 40):
        documents = [Document(f"{count}/{i}", "text") for i in range(count)]
        training, held_out = split_held_out(documents, None)
        assert held_out and len(training) + len(held_out) == count


def test_corpus_hash_sees_text_names_and_order() -> None:
    a, b = Document("a", "1"), Document("b", "2")
    hashes = {corpus_hash(d) for d in ([a, b], [b, a], [a], [a, Document("b", "3")], [a, Document("c", "2")])}
    assert len(hashes) == 5


def test_tokenizer_round_trips_any_text_and_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer([_TEXT], 300)
    strange = "naïve \U0001f600\n\tif x:\x00"
    assert tokenizer.decode(tokenizer.encode(strange).ids, skip_special_tokens=False) == strange
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    save_tokenizer(tokenizer, tmp_path, max_positions=128)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(strange)["input_ids"] == tokenizer.encode(strange).ids
    assert theirs.eos_token_id == END_OF_TEXT_ID and theirs.model_max_length == 128


def test_each_document_ends_with_the_separator() -> None:
    tokenizer = train_tokenizer([_TEXT], 300)
    stream = encode_documents([Document("a", "def"), Document("b", "add")], tokenizer, END_OF_TEXT_ID)
    assert (stream == END_OF_TEXT_ID).sum() == 2 and stream[-1] == END_OF_TEXT_ID


def test_an_epoch_shows_every_window_once_and_the_next_one_others() -> None:
    windows = TokenWindows(np.arange(1003, dtype=np.int32), sequence_length=10, batch_size=3, seed=4)
    first = torch.cat([windows.batch(step) for step in range(33)])  # 99 windows: an epoch
    starts = first[:, 0].tolist()
    assert len(set(starts)) == 99 and len({s % 10 for s in starts}) == 1
    assert (first == first[:, :1] + torch.arange(11)).all()
    assert starts != sorted(starts)
    second = torch.cat([windows.batch(step) for step in range(33, 66)])[:, 0].tolist()
    assert second != starts


def test_a_batch_depends_on_step_and_seed_alone() -> None:
    stream = np.arange(500, dtype=np.int32)
    one, again, other = (TokenWindows(stream, 8, 4, seed) for seed in (1, 1, 2))
    for step in (9, 0, 5):
        assert torch.equal(one.batch(step), again.batch(step))
    assert not torch.equal(one.batch(0), other.batch(0))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        TokenWindows(np.arange(12, dtype=np.int32), 8, 1, 0)


def test_blocks_have_one_length_within_bounds_and_a_random_offset() -> None:
    lengths, offsets = set(), set()
    for step in range(200):
        blocks = block_index(step, 64, (2, 5), seed=3)[0]
        assert (blocks.diff() >= 0).all() and blocks.diff().max() <= 1
        sizes = torch.bincount(blocks - blocks[0])
        assert len(set(sizes[1:-1].tolist())) == 1
        assert sizes[0] <= sizes[1] and sizes[-1] <= sizes[1]
        lengths.add(int(sizes[1]))
        offsets.add((int(sizes[1]), int(sizes[0])))
    assert lengths == {2, 3, 4, 5} and len(offsets) == 14  # every offset of every length


@pytest.mark.parametrize(("text", "lengths"), [("2", (2, 2)), ("1-8", (1, 8))])
def test_block_lengths_are_a_number_or_a_range(text: str, lengths: tuple[int, int]) -> None:
    assert parse_block_lengths(text) == lengths


@pytest.mark.parametrize("text", ["0", "8-1", "x", "", "1-", "-3", "1-2-3"])
def test_other_block_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="block lengths"):
        parse_block_lengths(text)


def test_held_out_prompts_are_deterministic_and_cut_from_the_modules(tmp_path: Path) -> None:
    write_held_out(tmp_path / "heldout.json")
    documents = read_held_out(tmp_path / "heldout.json")
    assert [d.name for d in documents] == list(STDLIB_HELD_OUT)
    tokenizer = train_tokenizer([documents[0].text], 400)
    prompts = heldout_prompts(documents, tokenizer, 12, min_tokens=20, max_tokens=40)
    assert prompts[:5] == heldout_prompts(documents, tokenizer, 5, min_tokens=20, max_tokens=40)
    by_name = {d.name: d.text for d in documents}
    for prompt in prompts:
        assert 20 <= len(prompt.token_ids) <= 40
        assert prompt.text.strip("\ufffd") in by_name[prompt.name.rpartition(":")[0]]
    assert len({p.name.rpartition(":")[0] for p in prompts}) == 12


def test_a_damaged_held_out_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "heldout.json").write_text('{"modules": ["no_such_module.py"]}')
    with pytest.raises(ConfigError, match="none of the modules"):
        read_held_out(tmp_path / "heldout.json")
    (tmp_path / "heldout.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a list"):
        read_held_out(tmp_path / "heldout.json")
