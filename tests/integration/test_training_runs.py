"""Whole runs on a tiny corpus: losses fall, a killed run repeats itself, what is saved loads elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tandem_serve import cli
from tandem_serve.bench.report.documents import read_documents
from tandem_serve.bench.report.tables import all_tables
from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import drafter_info, fingerprint, load_decoder, load_drafter, primary_info
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.demo import assemble_demo
from tandem_serve.training.evaluate_pair import EvaluationPlan, evaluate_pair
from tandem_serve.training.held_out import read_held_out
from tandem_serve.training.primary import sequence_logits
from tandem_serve.training.run_folder import RunFolder

_SHAPE = ["--layers", "2", "--hidden-size", "32", "--intermediate-size", "64", "--heads", "2", "--kv-heads", "1"]
_BATCH = ["--sequence-length", "32", "--batch-size", "4", "--threads", "1", "--precision", "fp32", "--quiet"]
_STEP_TOKENS = 4 * 32
_SIDE_BY_SIDE = ["--both", "--other-layer-map", "0+2", "--other-block-lengths", "2"]
_DRAFTER_TOKENS = ["--tokens", str(41 * _STEP_TOKENS), "--sampled-tokens", "2k"]


def _command(kind: str, *arguments: str | Path) -> list[str]:
    command = [sys.executable, "-m", "tandem_serve.cli_train", kind, *map(str, arguments)]
    return [*command, *_SHAPE, *_BATCH]


def _run(kind: str, *arguments: str | Path) -> None:
    subprocess.run(_command(kind, *arguments), check=True, capture_output=True, timeout=120)


def _losses(folder: Path) -> dict[int, dict[str, float]]:
    return {record["step"]: record["losses"] for record in RunFolder(folder).read_log()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        lines = (f"def function_{i}_{j}(value):\n    return value + {i * j}\n\n" for j in range(20))
        (folder / f"module_{i}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def primary_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("primary")
    _run("primary", "--data", corpus, "--out", out, "--vocab-size", 300, "--tokens", 41 * _STEP_TOKENS)
    return out


@pytest.fixture(scope="module")
def drafter_run(corpus: Path, primary_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drafters")
    model = primary_run / "model"
    _run("drafter", "--data", corpus, "--primary", model, "--out", out, *_DRAFTER_TOKENS, *_SIDE_BY_SIDE)
    return out


def test_the_loss_falls(primary_run: Path, drafter_run: Path) -> None:
    for folder in (primary_run, drafter_run):
        losses = _losses(folder)
        for name, first in losses[0].items():
            assert losses[40][name] < first - 1.0


def test_the_primary_loads_here_and_in_transformers(primary_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = primary_run / "model"
    ours = load_decoder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("def function_1_2(value):\n")["input_ids"]])
    with torch.no_grad():
        assert (theirs(token_ids).logits - sequence_logits(ours, token_ids)).abs().max() < 1e-4
    assert primary_info(folder).vocab_size == 300


def test_drafters_load_and_name_their_primary(primary_run: Path, drafter_run: Path) -> None:
    tandem, plain = load_drafter(drafter_run / "drafter"), load_drafter(drafter_run / "plain-drafter")
    assert isinstance(tandem, TandemDrafter) and isinstance(plain, Decoder)
    assert tandem.taps == (1, 2)
    third = load_drafter(drafter_run / "drafter-0+2")
    assert isinstance(third, TandemDrafter) and third.taps == (0, 2)
    info = drafter_info(drafter_run / "drafter", max_block_length=8)
    assert info.primary_fingerprint == fingerprint(primary_run / "model")
    assert info.tokenizer_hash == primary_info(primary_run / "model").tokenizer_hash


def test_provenance_says_how_it_was_made(primary_run: Path, drafter_run: Path) -> None:
    for folder in (primary_run / "model", drafter_run / "drafter", drafter_run / "plain-drafter"):
        record = RunFolder(folder).read_provenance()
        assert {"command", "git_commit", "python", "torch", "data_hash", "held_out", "num_steps"} <= record.keys()
        assert record["held_out"] and not {n for n in record["held_out"] if not n.endswith(".py")}


@pytest.mark.parametrize(
    ("name", "options"), [("plain-drafter", ["--plain"]), ("drafter-blocks-2", ["--block-lengths", "2"])]
)
def test_a_drafter_trained_alone_equals_the_one_trained_beside_others(
    name: str, options: list[str], corpus: Path, primary_run: Path, drafter_run: Path, tmp_path: Path
) -> None:
    model = primary_run / "model"
    _run("drafter", "--data", corpus, "--primary", model, "--out", tmp_path, *_DRAFTER_TOKENS, *options)
    alone, beside = _losses(tmp_path), _losses(drafter_run)
    assert [[*losses.values()] for losses in alone.values()] == [[losses[name]] for losses in beside.values()]


def test_a_run_can_begin_with_another_ones_drafters(
    corpus: Path, primary_run: Path, drafter_run: Path, tmp_path: Path
) -> None:
    arguments = ["--data", corpus, "--primary", primary_run / "model", "--out", tmp_path, "--both"]
    arguments += ["--tokens", _STEP_TOKENS, "--start-from", drafter_run, "--cross-entropy-share", 0]
    _run("drafter", *arguments)
    first, began = _losses(tmp_path)[0], _losses(drafter_run)[0]
    assert all(first[name] < began[name] - 1.0 for name in first)


@pytest.mark.parametrize("kind", ["primary", "drafter"])
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(
    kind: str, corpus: Path, primary_run: Path, drafter_run: Path, tmp_path: Path
) -> None:
    if kind == "primary":
        arguments, whole = ["--vocab-size", "300", "--tokens", str(41 * _STEP_TOKENS)], primary_run
    else:
        arguments, whole = ["--primary", str(primary_run / "model"), *_SIDE_BY_SIDE, *_DRAFTER_TOKENS], drafter_run
    arguments += ["--data", str(corpus), "--out", str(tmp_path)]
    arguments += ["--checkpoint-interval-s", "0"]  # after every step
    process = subprocess.Popen(_command(kind, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(lambda: (tmp_path / "log.jsonl").is_file() and len(_lines(tmp_path)) >= 2, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "model").exists() and not (tmp_path / "drafter").exists()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 12, "los')  # a line that the kill cut in two
    _run(kind, *arguments)
    assert _losses(tmp_path) == _losses(whole)


def test_a_primary_can_take_another_models_tokenizer(corpus: Path, primary_run: Path, tmp_path: Path) -> None:
    model = primary_run / "model"
    (tmp_path / "other.txt").write_text("Whither wander you? Over hill, over dale.\n" * 300)
    arguments = ["--data", tmp_path / "other.txt", "--out", tmp_path / "run", "--tokens", _STEP_TOKENS]
    _run("primary", *arguments, "--vocab-size", 300, "--tokenizer-from", model)
    assert primary_info(tmp_path / "run" / "model").tokenizer_hash == primary_info(model).tokenizer_hash
    command = _command("primary", *arguments, "--vocab-size", 100, "--tokenizer-from", model)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "are more than --vocab-size" in refused.stderr


def test_another_runs_state_is_refused(corpus: Path, primary_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", corpus, "--vocab-size", 300, "--out", out, "--tokens", _STEP_TOKENS]
    _run("primary", *arguments)
    command = [*_command("primary", *arguments), "--seed", "1"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and "state of another run" in refused.stderr
    assert subprocess.run([*command, "--no-resume"], capture_output=True, timeout=120).returncode == 0


def test_eval_reports_every_drafter(primary_run: Path, drafter_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"def function_{i}_7(value):" * (1 + i)}) + "\n" for i in range(3))
    )
    arguments = [f"--drafter={name}={drafter_run / name}" for name in ("drafter", "plain-drafter")]
    text = tmp_path / "text.py"
    text.write_text("".join(f"def function_{i}(value):\n    return value + {i}\n\n" for i in range(200)))
    arguments += ["--primary", str(primary_run / "model"), "--data", str(text), "--windows", "1"]
    arguments += ["--prompts", str(prompts), "--json", str(tmp_path / "e.json")]
    arguments += ["--block-lengths", "1..4,6", "--temperatures", "0,0.8", "--num-tokens", "12", "--couplings"]
    result = CliRunner().invoke(cli.app, ["eval", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["kind"] == "eval" and set(report["drafters"]) == {"drafter", "plain-drafter"}
    for figures in report["drafters"].values():
        assert set(figures["drafting"]) == {"0", "0.8"} and figures["num_parameters"] > 0
        for drafting in figures["drafting"].values():
            assert list(drafting["block_lengths"]) == ["1", "2", "3", "4", "6"] and drafting["num_responses"] == 3
            assert 0 <= drafting["block_lengths"]["4"]["accepted_per_block"] <= 4
        assert 0 < figures["text"]["block_lengths"]["2"]["total_variation"] < 1
        assert set(figures["couplings"]) == {"0.2", "0.4", "0.6", "0.8", "1", "1.2"}
    plain = report["drafters"]["plain-drafter"]["text"]["by_position"]["agreement"]
    assert len(set(plain)) == 1  # blocks mean nothing to it


def test_an_evaluation_knows_what_each_of_several_drafters_was_trained_with(
    primary_run: Path, drafter_run: Path, tmp_path: Path
) -> None:
    drafters = {name: str(drafter_run / name) for name in ("drafter", "drafter-0+2", "drafter-blocks-2")}
    sizes = {"num_windows": 1, "window_tokens": 64, "num_prompts": 2, "prompt_tokens": 20, "num_tokens": 20}
    plan = EvaluationPlan(block_lengths=(1, 2), **sizes)
    report = evaluate_pair(primary_run / "model", drafters, plan)
    trained = {name: figures["training"] for name, figures in report["drafters"].items()}
    assert {name: tuple(of_one["block_lengths"]) for name, of_one in trained.items()} == {
        "drafter": (1, 8),
        "drafter-0+2": (1, 8),
        "drafter-blocks-2": (2, 2),
    }
    assert trained["drafter-0+2"]["layer_map"] == "0+2" != trained["drafter"]["layer_map"]
    (tmp_path / "sweep.json").write_text(json.dumps(report))
    (sweep,) = (t for t in all_tables(read_documents(tmp_path)) if "block length in training and inference" in t.title)
    assert [row[:2] for row in sweep.rows] == [["drafter", "1-8"], ["drafter-0+2", "1-8"], ["drafter-blocks-2", "2"]]
    with pytest.raises(ConfigError, match="another primary"):
        evaluate_pair(drafter_run / "plain-drafter", drafters, plan)


def test_a_pair_is_assembled_with_cards_and_figures(primary_run: Path, drafter_run: Path, tmp_path: Path) -> None:
    sizes = {"num_windows": 1, "window_tokens": 64, "num_prompts": 2, "prompt_tokens": 20, "num_tokens": 20}
    plan = EvaluationPlan(block_lengths=(2, 5), **sizes)
    report = assemble_demo(primary_run, drafter_run, tmp_path / "pair", plan)
    pair = tmp_path / "pair"
    assert json.loads((pair / "evaluation.json").read_text()) == report
    assert read_held_out(pair / "heldout.json")
    for name in ("primary", "drafter", "plain-drafter"):
        load_drafter(pair / name)
        assert RunFolder(pair / name).read_provenance()["data_hash"]
    assert f"Loss {report['primary']['loss']:.3f}" in (pair / "primary" / "README.md").read_text()
    accepted = report["drafters"]["drafter"]["drafting"]["0"]["block_lengths"]["5"]["accepted_per_block"]
    assert f"**{accepted:.2f}**" in (pair / "drafter" / "README.md").read_text()


def _lines(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


def _wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    """Polls until the condition holds; a process that ended first has failed to be killed in time."""
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
