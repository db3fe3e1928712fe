"""`train router` and `bench policies` on a tiny pair: what they write, and what must hold whatever the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tandem_serve import cli_bench, cli_train
from tandem_serve.models.acceptance import ROUTER_FILE
from tandem_serve.models.checkpoint import drafter_acceptance, load_decoder, load_drafter, primary_info
from tandem_serve.training.corpus import Document
from tandem_serve.training.fit_router import REPORT_FILE, RouterConfig, fit_router
from tandem_serve.training.router_examples import collect_examples, write_texts
from tandem_serve.types import PolicyName
from tests.checkpoints import make_drafter, make_plain_drafter, make_primary
from tests.drafter_peer import drafts_behind


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    primary = make_primary(folder / "primary")
    make_drafter(folder / "drafter", primary)
    make_plain_drafter(folder / "plain-drafter", primary)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(4)))
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"m{i}.py").write_text("".join(f"def f{i}_{j}(value):\n    return value + {j}\n" for j in range(500)))
    return folder


@pytest.fixture(scope="module")
def report(pair: Path) -> dict[str, Any]:
    """The router's report; the pair has a router from here on."""
    options = ["--primary", str(pair / "primary"), "--drafter", str(pair / "drafter"), "--data", str(pair / "corpus")]
    result = CliRunner().invoke(
        cli_train.app, ["router", *options, "--limit", "8", "--block-length", "4", "--json", str(pair / "router.json")]
    )
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((pair / "drafter" / REPORT_FILE).read_text())
    assert json.loads((pair / "router.json").read_text()) == found
    return found


def test_examples_are_what_the_pair_drafts(pair: Path) -> None:
    """Draft by draft, against MS run token by token; whether it is right, against the text."""
    primary, drafter = load_decoder(pair / "primary").pack(), load_drafter(pair / "drafter").pack()
    texts = write_texts(primary, primary_info(pair / "primary"), [(5, 6, 7, 8), (9, 10, 11, 12)], 12, 0.8)
    examples = collect_examples(primary, drafter, texts, block_length=3, top_k=2)
    assert examples.is_right.shape == (2, 9, 3)
    assert examples.features.top_ids.shape == (2, 9, 3, 2)
    assert texts.sampling[0].temperature == 0 and texts.sampling[1].temperature == 0.8
    num_right = 0
    for row, sampling in enumerate(texts.sampling):
        text = texts.token_ids[row].tolist()
        for opening in range(9):
            drafts = drafts_behind(text[: 4 + opening + 1], 3, sampling)
            theirs = text[4 + opening + 1 : 4 + opening + 4]
            right = [ours == other for ours, other in zip(drafts, theirs, strict=True)]
            reached = right.index(False) + 1 if False in right else 3  # behind a wrong draft, teacher forcing differs
            assert examples.is_right[row, opening].tolist()[:reached] == right[:reached]
            num_right += sum(right[:reached])
    assert 10 < num_right < 54


def test_the_report_says_what_each_predictor_is_worth(pair: Path, report: dict[str, Any]) -> None:
    assert set(report["calibration"]) == {"entropy", "router", "optimal"}
    assert report["num_texts"] == 4
    for name, figures in report["calibration"].items():
        assert 0 < figures["brier"] < (1 if name == "entropy" else 0.3)  # entropy is a bound, no estimate
        assert sum(b["count"] for b in figures["bins"]) == report["num_drafts"]
    assert set(report["costs_ms"]) == {"fixed", "entropy", "router", "optimal"}
    assert all(milliseconds >= 0 for costs in report["costs_ms"].values() for milliseconds in costs.values())
    for what in ("round_s", "verify_s"):  # policies differ in what a draft takes, in nothing else
        assert len({costs[what] for costs in report["costs_ms"].values()}) == 1
    model = drafter_acceptance(pair / "drafter")
    assert model is not None
    for policy in (PolicyName.ENTROPY, PolicyName.ROUTER, PolicyName.OPTIMAL):
        assert model.thresholds[policy] == report["policies"][policy.value]["threshold"]
    assert report["provenance"]["command"]


def test_held_out_texts_are_measured_on_alone(pair: Path, tmp_path: Path) -> None:
    training = [Document("some", "def f(value):\n    return value\n" * 60)]
    config = RouterConfig(num_texts=6, num_tokens=16, block_length=3, num_steps=20)
    found = []
    for name, text in (("code", "class A:\n    pass\n"), ("prose", "To be, or not to be.\n")):
        held_out = [Document(name, text * 60)]
        file = fit_router(pair / "primary", pair / "drafter", training, held_out, config, tmp_path / name)
        figures = json.loads((tmp_path / name / REPORT_FILE).read_text())
        found.append((load_file(file), figures["calibration"]["optimal"]["bins"]))
    (code, of_code), (prose, of_prose) = found
    assert code and all(torch.equal(code[name], prose[name]) for name in code)
    assert of_code != of_prose


def test_soft_labels(pair: Path, report: dict[str, Any]) -> None:
    options = ["--primary", str(pair / "primary"), "--drafter", str(pair / "drafter"), "--data", str(pair / "corpus")]
    soft = ["--limit", "6", "--block-length", "2", "--target", "tv", "--out", str(pair / "soft")]
    result = CliRunner().invoke(cli_train.app, ["router", *options, *soft])
    assert result.exit_code == 0, result.output
    assert (pair / "soft" / ROUTER_FILE).is_file()
    assert json.loads((pair / "soft" / REPORT_FILE).read_text())["config"]["target"] == "tv"
    result = CliRunner().invoke(cli_train.app, ["router", *options, "--target", "luck"])
    assert result.exit_code != 0 and "expected accept or tv" in result.output


def test_every_policy_writes_the_same_text(pair: Path, report: dict[str, Any]) -> None:
    assert (pair / "drafter" / ROUTER_FILE).is_file()
    out = pair / "policies.json"
    options = ["--pair", str(pair), "--prompts", str(pair / "prompts.jsonl"), "--max-tokens", "16", "--json", str(out)]
    names = "fixed-1-2,fixed-5,entropy,router,optimal,plain-drafter:fixed-2-3"
    load = ["--batch", "1,2", "--samples", "1,3", "--policies", names]
    result = CliRunner().invoke(cli_bench.app, ["policies", *options, *load])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["has_acceptance_model"] is True
    loads = [(cell["batch"], cell["n"], cell["temperature"]) for cell in figures["cells"]]
    assert loads == [(1, 1, 0), (2, 1, 0), (1, 1, 0.8), (1, 3, 0.8), (2, 1, 0.8), (2, 3, 0.8)]
    for cell in figures["cells"]:
        ours = {"fixed-1", "fixed-2", "fixed-5", "entropy", "router", "optimal"}
        assert set(cell["policies"]) == ours | {"plain-drafter:fixed-2", "plain-drafter:fixed-3"}
        best, plain = (cell["policies"][cell[name]]["tokens_per_s"] for name in ("best_fixed", "best_fixed_plain"))
        assert cell["best_fixed"] in ours and cell["tandem/plain-drafter"] == best / plain
        assert cell["policies"][cell["best_fixed"]]["over_best_fixed"] == 1
        assert cell["num_groups"] == 4 // cell["batch"]
        for policy in cell["policies"].values():
            assert policy["identical_groups"] == cell["num_groups"]
            assert policy["tokens_per_s"] > 0
        assert cell["policies"]["fixed-1"]["drafts_a_round"] <= 1


def test_a_steady_load_counts_full_steps_alone(pair: Path, report: dict[str, Any]) -> None:
    out = pair / "steady.json"
    options = ["--pair", str(pair), "--prompts", str(pair / "prompts.jsonl"), "--max-tokens", "16", "--json", str(out)]
    load = ["--steady", "--batch", "1", "--samples", "1,3", "--policies", "fixed-2,optimal", "--temperature", "0.8"]
    result = CliRunner().invoke(cli_bench.app, ["policies", *options, *load])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert [(cell["n"], cell["num_groups"]) for cell in figures["cells"]] == [(1, 1), (3, 1)]
    for cell in figures["cells"]:
        assert all(policy["identical_groups"] == 1 for policy in cell["policies"].values())
    result = CliRunner().invoke(cli_bench.app, ["policies", *options, *load[:1], "--batch", "2"])
    assert result.exit_code != 0 and "--batch 2 needs 6 prompts at least" in result.output


def test_standalone_modes_range_from_ml_to_ms(pair: Path) -> None:
    """What they write is tested with the engine; here, that each figure is of the right mode."""
    out = pair / "standalone.json"
    text = str(pair / "corpus")  # prompts are cut from it, too
    options = ["--pair", str(pair), "--prompts", text, "--limit", "3", "--max-tokens", "12", "--json", str(out)]
    options += ["--data", text, "--windows", "1"]
    models = ["--model", f"copy={pair / 'primary'}", "--model", f"small={pair / 'plain-drafter'}"]
    result = CliRunner().invoke(cli_bench.app, ["standalone", *options, *models, "--block-lengths", "2,3"])
    assert result.exit_code == 0, result.output
    modes = json.loads(out.read_text())["modes"]
    tandem = {f"{variant}-{length}" for variant in ("tandem", "representations") for length in (2, 3)}
    assert set(modes) == {"primary", "tandem-endless", "copy", "small"} | tandem
    for name in ("primary", "copy"):
        assert modes[name]["primary_agrees"] == 100
    assert modes["copy"]["agreement"] == 100 and modes["copy"]["total_variation"] < 1e-4
    assert modes["copy"]["accuracy"] == pytest.approx(modes["primary"]["accuracy"])
    for length in (2, 3):  # one token in length + 1 is the primary's own
        drafts, mixed = modes[f"representations-{length}"], modes[f"tandem-{length}"]
        for name in ("accuracy", "agreement", "total_variation", "cross_entropy"):
            whole = length * drafts[name] + modes["primary"][name]
            assert mixed[name] == pytest.approx(whole / (length + 1)), name
    assert modes["primary"]["over_primary"] == 1
    for name in (*tandem, "small", "tandem-endless"):
        assert (
            0 < modes[name]["primary_agrees"] < 100 and modes[name]["primary_loss"] > modes["primary"]["primary_loss"]
        )


@pytest.mark.parametrize("names", ["fixed", "fixed-0", "fixed-1-2-3", "luck", "fixed-99"])
def test_unknown_policies_are_named(pair: Path, names: str) -> None:
    result = CliRunner().invoke(cli_bench.app, ["policies", "--pair", str(pair), "--policies", names])
    assert result.exit_code == 2
    assert "expected fixed-N" in result.output
