"""`bench decode` on a tiny pair: the document it writes, and what must hold in it whatever the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem_serve.bench import overhead
from tandem_serve.bench.overhead import OverheadOptions
from tandem_serve.cli_bench import app
from tests.checkpoints import make_drafter, make_plain_drafter, make_primary


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    primary = make_primary(folder / "primary")
    make_drafter(folder / "drafter", primary)
    make_plain_drafter(folder / "plain-drafter", primary)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(3)))
    return folder


def run(pair: Path, *options: str) -> dict:
    out = pair / "out.json"
    common = ["--pair", str(pair), "--prompts", str(pair / "prompts.jsonl"), "--max-tokens", "12", "--json", str(out)]
    result = CliRunner().invoke(app, ["decode", *common, *options])
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_document(pair: Path, temperature: str) -> None:
    figures = run(pair, "--temperature", temperature)
    assert set(figures["modes"]) == {"plain", "plain-drafter", "tandem"}
    assert set(figures["ratios"]) == {"tandem/plain", "tandem/plain-drafter", "plain-drafter/plain"}
    assert figures["num_prompts"] == 3
    for name, mode in figures["modes"].items():
        assert mode["identical_to_plain"] is True
        assert mode["tokens_per_s"] > 0
        assert (mode["num_drafts"] > 0) == (name != "plain")
    tandem = figures["modes"]["tandem"]
    assert tandem["accepted_per_block"] > 0  # the drafter is the primary with a little noise
    assert tandem["mean_acceptance_length"] == pytest.approx(1 + sum(tandem["accepted_per_position"]))
    assert figures["ratios"]["tandem/plain"] == pytest.approx(
        tandem["tokens_per_s"] / figures["modes"]["plain"]["tokens_per_s"]
    )


@pytest.mark.slow
def test_what_being_watched_costs_is_measured_on_two_real_clusters(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "held_out_prompts", lambda *_, **__: [(5, 6, 7)])
    options = OverheadOptions(pair, limit=1, max_tokens=24, sample_ratio=1.0, scrape_interval_s=0.1)
    figures = overhead.run_overhead(options, lambda total: lambda: None)
    assert set(figures["modes"]) == {"bare", "control", "observed"}
    assert figures["modes"]["observed"]["identical_to_plain"] is True
    assert figures["ratios"]["observed/bare"] > 0
    assert figures["num_scrapes"] > 0
    assert figures["num_exports"] > 0  # by the time that the processes have ended


def test_inflation_changes_no_token_and_is_declared(pair: Path) -> None:
    figures = run(pair, "--inflate", "3", "--modes", "plain,tandem")
    assert figures["inflated"] is True
    assert figures["primary_parameters_inflated"] > figures["primary_parameters"]
    assert figures["modes"]["tandem"]["identical_to_plain"] is True
    assert figures["modes"]["tandem"]["accepted_per_block"] > 0  # taps are untouched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "plain,medusa"], "medusa"),
        (["--prompts", "heldout"], "provenance.json"),
        (["--field", "text"], "text"),
        (["--pair", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_are_named(pair: Path, options: list[str], message: str) -> None:
    common = ["--pair", str(pair), "--prompts", str(pair / "prompts.jsonl")]
    result = CliRunner().invoke(app, ["decode", *common, *options])
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_steps_compares_the_same_weights(pair: Path) -> None:
    out = pair / "steps.json"
    result = CliRunner().invoke(
        app, ["steps", "--pair", str(pair), "--context", "16", "--count", "10", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    models = json.loads(out.read_text())["models"]
    assert set(models) == {"primary", "drafter"}
    for found in models.values():
        assert found["ratio"] > 0
        assert all(ms > 0 for by_dtype in found["step_ms"].values() for ms in by_dtype.values())
