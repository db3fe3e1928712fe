"""`bench engines` on a tiny pair: the document it writes, and what must hold in it whatever the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem_serve.bench.engines import FAULTY
from tandem_serve.cli_bench import app
from tests.checkpoints import CONFIG, make_drafter, make_plain_drafter, make_primary
from tests.vllm_models import MODEL, needs_vllm


def run(folder: Path, model: object, *options: str) -> dict:
    primary = make_primary(folder / "primary", config=model)  # type: ignore[arg-type]
    make_drafter(folder / "drafter", primary)
    make_plain_drafter(folder / "plain-drafter", primary)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(3)))
    out = folder / "out.json"
    arguments = ["--pair", str(folder), "--prompts", str(folder / "prompts.jsonl"), "--max-tokens", "24"]
    arguments += ["--json", str(out), "--html", str(folder / "out.html"), "--concurrency", "1,2", *options]
    result = CliRunner().invoke(app, ["engines", *arguments])
    assert result.exit_code == 0, result.output
    assert "tokens/s" in (folder / "out.html").read_text()
    return json.loads(out.read_text())


def check(figures: dict, modes: set[str]) -> None:
    assert set(figures["modes"]) == {"1", "2"}
    for by_mode in figures["modes"].values():
        assert set(by_mode) == modes
        for name, mode in by_mode.items():
            assert mode["identical_to_plain"] == figures["num_prompts"] == 3, name
            assert mode["tokens_per_s"] > 0
    for name in modes - {"vllm-tandem", *FAULTY}:  # these may find that drafts do not pay on so small a pair
        has_accepted = any(by_mode[name]["accepted_per_block"] > 0 for by_mode in figures["modes"].values())
        assert has_accepted == ("tandem" in name), name


def test_document(tmp_path: Path) -> None:
    figures = run(tmp_path, CONFIG, "--modes", "torch,torch-tandem", "--inflate", "2")
    check(figures, {"torch", "torch-tandem"})
    assert set(figures["ratios"]["torch-tandem/torch"]) == {"1", "2"}


def test_unknown_modes_and_numbers_are_named() -> None:
    for options, named in ((["--modes", "medusa"], "medusa"), (["--concurrency", "0"], "above 0")):
        result = CliRunner().invoke(app, ["engines", *options])
        assert (result.exit_code, named in result.output) == (2, True), result.output


@pytest.mark.parametrize("mark", [pytest.param("vllm", marks=needs_vllm)])
def test_vllm_modes(tmp_path: Path, mark: str) -> None:
    modes = {"vllm", "vllm-undrafted", "vllm-tandem"}
    figures = run(tmp_path, MODEL, "--modes", ",".join(sorted(modes)))
    check(figures, modes)
    assert set(figures["ratios"]["vllm-tandem/vllm"]) == {"1", "2"}


@pytest.mark.parametrize("mark", [pytest.param("vllm", marks=needs_vllm)])
def test_a_bad_network_changes_no_token_of_vllm_s(tmp_path: Path, mark: str) -> None:
    modes = {"vllm", *FAULTY}
    figures = run(tmp_path, MODEL, "--modes", ",".join(sorted(modes)))
    check(figures, modes)
    assert set(figures["ratios"]) == {f"{mode}/vllm" for mode in FAULTY}
