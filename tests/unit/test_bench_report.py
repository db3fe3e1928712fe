"""The report on documents of every kind; what is missing in them is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tandem_serve.bench.report import paper
from tandem_serve.bench.report.documents import read_documents
from tandem_serve.bench.report.eval_tables import projected_speed
from tandem_serve.bench.report.page import write_report
from tandem_serve.bench.report.tables import all_tables
from tandem_serve.errors import ConfigError


def _drafter(kind: str, accepted: float, trained: list[int]) -> dict[str, Any]:
    lengths = {
        g: {
            "accepted_per_block": accepted,
            "accepted_per_block_error": 0.0625,
            "accepted_per_position": [0.5] * int(g),
            "agreement": 70.0,
            "primary_runs_per_response": 40.0,
            "drafter_runs_per_response": 64.0,
        }
        for g in ("2", "5")
    }
    text = {"accuracy": 30.0, "agreement": 61.5, "cross_entropy": 3.0, "total_variation": 0.25}
    return {
        "type": kind,
        "training": {"block_lengths": trained, "distillation_weight": 0.5, "num_tokens": 1000},
        "num_parameters": 1000,
        "text": {"block_lengths": {"2": text}, "by_position": {"agreement": [62.0, 61.0]}},
        "drafting": {"0": {"block_lengths": lengths}},
    }


_cell = {
    "batch": 1,
    "n": 4,
    "policies": {
        "fixed-1": {"tokens_per_s": 90.0, "over_best_fixed": 1.0},
        "plain-drafter:fixed-2": {"tokens_per_s": 80.0, "over_best_fixed": 0.9},
        "optimal": {"over_best_fixed": 1.0625},
    },
    "best_fixed": "fixed-1",
    "best_fixed_plain": "plain-drafter:fixed-2",
    "tandem/plain-drafter": 1.125,
}


def _evaluation(data: str = "heldout", **drafters: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "eval",
        "primary": {"loss": 3.5, "accuracy": 31.0, "num_parameters": 5000},
        "drafters": drafters,
        "plan": {"num_tokens": 128, "data": data, "prompts": "", "block_lengths": [2, 5]},
        "provenance": {"command": "tandem-serve eval <x>", "git_commit": "0123456789abcdef"},
    }


def _decode(inflate: int) -> dict[str, Any]:
    mode = {"tokens_per_s": 100.0, "accepted_per_block": 2.0, "identical_prompts": 3}
    return {
        "modes": {"plain": mode | {"identical_prompts": None}, "tandem": mode},
        "ratios": {"tandem/plain": 1.0 + inflate / 8},
        "options": {"inflate": inflate, "temperature": 0.0, "block_length": 5},
        "num_prompts": 3,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    couplings = {t: {"token": {"rejection": 0.8}, "block": {"rejection": 2.5}} for t in ("0.2", "0.8")}
    tandem = _drafter("tandem", 2.5, [1, 8])
    first = _evaluation(
        tandem=tandem | {"couplings": couplings},
        paper=_drafter("tandem", 2.2, [2, 2]),
        plain=_drafter("plain", 2.0, [1, 8]),
    )
    lookup = {"type": "prompt-lookup", "training": {}, "num_parameters": 0, "drafting": tandem["drafting"]}
    along = _drafter("tandem", 2.6, [1, 8])
    along["training"]["train_primary"] = "both-losses"
    frozen = _drafter("tandem", 2.4, [1, 8])
    frozen["training"]["train_primary"] = "frozen"
    engine = {"tokens_per_s": 90.0, "tokens_per_step": 3.5, "idle_share": 0.05}
    documents = {
        "python": first,
        "prose": _evaluation(tandem=tandem, lookup=lookup),
        "domain-prose": _evaluation("prose.txt", tandem=tandem, lookup=lookup),
        "mode-both": _evaluation(sketching=along),
        "mode-frozen": _evaluation(sketching=frozen),
        "engines": {
            "modes": {"4": {"vllm": engine, "vllm-tandem": engine}},
            "ratios": {"vllm-tandem/vllm": {"4": 1.5}},
            "options": {"inflate": 8},
        },
        "speed/once": _decode(1),
        "speed/eightfold": _decode(8),
        "router": {
            "calibration": {
                "entropy": {"bins": [{"score": 0.2, "accepted": 0.25, "count": 9}], "auc": 0.8, "brier": None}
            },
            "policies": {"fixed": {"block_length": 5}, "router": {"threshold": 0.3, "tokens_per_s": 90.0}},
        },
        "early-router": {"calibration": {}},
        "policies": {"cells": [_cell]},
        "alone": {
            "kind": "standalone",
            "options": {"inflate": 8},
            "modes": {
                "primary": {"over_primary": 1.0, "accuracy": 40.0, "over_primary_by_prompt": {"p50": 1.0}},
                "tandem-endless": {"over_primary": 6.5},
            },
        },
        "other": {"something": "else"},
    }
    for name, document in documents.items():
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(document))
    (tmp_path / "broken.json").write_text("{")
    records = [{"step": i, "tokens": 100 * i, "losses": {"drafter": 5.0 - i}} for i in range(3)]
    for name in ("run", "run-2", "run-3", "run-4"):  # more than there are columns of panels
        (tmp_path / name).mkdir()
        log = tmp_path / name / "log.jsonl"
        log.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "lo')
    return tmp_path


def test_the_page_stands_alone_and_shows_every_document(folder: Path, tmp_path: Path) -> None:
    assert write_report(folder, tmp_path / "out" / "report.html") == 16
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 * 5 + 1 + 6
    for reference in ('src="http', 'href="http', "<script"):
        assert reference not in page
    links, targets = re.findall(r'href="#([^"]+)"', page), re.findall(r'id="([^"]+)"', page)
    assert links == targets and len(set(links)) == len(links) == 10
    assert "tandem-serve eval &lt;x&gt;" in page and "0123456789ab" in page
    for title in (
        "Table 1",
        "Table 2",
        "peers on the same primary",
        "By domain",
        "Training configurations",
        "Measured engines",
        ">Side by side</h2>",
        ">policies</h2>",
        "<h3>block policies",
        "calibration of each predictor",
        "Training losses",
    ):
        assert title in page


def test_tables_stand_beside_the_papers(folder: Path) -> None:
    tables = {table.title: table for table in all_tables(read_documents(folder))}
    text = tables["python: held-out text (Table 1)"]
    assert ["tandem", "Tandem-Distil", "1,000", "2", "30.00", "3.000", "61.50", "0.250"] in text.rows
    assert ["Tandem-Distil", "58.61", "1.990", "81.00", "0.141"] in tables["The paper's Table 1"].rows
    sweep = tables["python: accepted a block, by block length in training and inference"]
    assert sweep.rows == [["tandem", "1-8", "2.50", "2.50"], ["paper", "2", "2.20", "2.20"]]
    assert "prose: accepted a block, by block length in training and inference" not in tables
    assert [row[0] for row in tables["prose: peers on the same primary and tokens"].rows] == ["tandem", "lookup"]
    assert [row[:3] for row in tables["By domain"].rows] == [
        [evaluation, text, drafter]
        for evaluation, text in (("domain-prose", "prose.txt"), ("prose", "heldout"))
        for drafter in ("tandem", "lookup")
    ]
    (configurations,) = (table for title, table in tables.items() if "Training configurations" in title)
    assert [row[3] for row in configurations.rows] == ["both-losses", "frozen"]
    (against,) = (table for title, table in tables.items() if "tandem over the plain drafter" in title)
    assert against.rows == [["policies", "1", "together", "1", "4", "", "fixed-1", "plain-drafter:fixed-2", "1.125"]]
    assert tables["Measured engines"].rows[1][-1] == "1.50"
    router = tables["router: policies at thresholds chosen on other texts, replayed"]
    assert router.columns == ("policy", "block length", "threshold", "tokens per s")
    assert router.rows == [["fixed", "5", "", ""], ["router", "", "0.3", "90"]]
    (policies,) = (table for title, table in tables.items() if "block policies" in title)
    assert [row[-1] for row in policies.rows if row[0] == "optimal"] == ["1.062"]
    (alone,) = (table for title, table in tables.items() if "standalone, primary inflated 8x" in title)
    assert alone.rows == [["primary", "1", "40"], ["tandem-endless", "6.5", ""]]
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.rows)


def test_projection_counts_both_models_passes() -> None:
    figures = {"primary_runs_per_response": 40.0, "drafter_runs_per_response": 64.0}
    assert projected_speed(_evaluation(), figures, 6.4) == pytest.approx(128 / 50)
    assert set(paper.TABLE_1) == set(paper.TABLE_1_NAMES)


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no document"):
        write_report(tmp_path, tmp_path / "report.html")
