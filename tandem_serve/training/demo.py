"""The demo pair from nothing: what `make train-demo` runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tandem_serve.models.checkpoint import atomic_folder
from tandem_serve.training.cards import write_drafter_card, write_primary_card
from tandem_serve.training.drafter_task import PLAIN, TANDEM
from tandem_serve.training.evaluate_pair import EvaluationPlan, evaluate_pair
from tandem_serve.training.held_out import write_held_out
from tandem_serve.training.run_folder import RunFolder

_PLAN = EvaluationPlan(block_lengths=(2, 5))
_TITLES = {TANDEM: "Demo tandem drafter", PLAIN: "Demo plain drafter"}


def assemble_demo(primary_run: Path, drafter_run: Path, out: Path, plan: EvaluationPlan = _PLAN) -> dict[str, Any]:
    """Gathers the trained models, measured, with cards and heldout.json, as one folder `out`."""
    folders = {TANDEM: drafter_run / TANDEM, PLAIN: drafter_run / PLAIN}
    report = evaluate_pair(primary_run / "model", {n: str(f) for n, f in folders.items()}, plan)
    report["tandem_against_plain"] = _gain(report["drafters"][TANDEM], report["drafters"][PLAIN])
    with atomic_folder(out) as fresh:
        shutil.copytree(primary_run / "model", fresh / "primary")
        run = RunFolder(primary_run)
        run.stamp(fresh / "primary")
        write_primary_card(fresh / "primary", run.read_provenance(), report["primary"], _run_s(run))
        run = RunFolder(drafter_run)
        for name, folder in folders.items():
            shutil.copytree(folder, fresh / name)
            figures = report["drafters"][name]
            write_drafter_card(fresh / name, _TITLES[name], run.read_provenance(), figures, _run_s(run))
        write_held_out(fresh / "heldout.json")
        (fresh / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _gain(tandem: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """What the pair is for: accepted tokens in percent, agreement in points, for each block length."""
    gain: dict[str, float] = {}
    for length, ours in tandem["drafting"]["0"]["block_lengths"].items():
        theirs, texts = plain["drafting"]["0"]["block_lengths"][length], (tandem["text"], plain["text"])
        agreement, other = (text["block_lengths"][length]["agreement"] for text in texts)
        gain |= {
            f"accepted_percent_{length}": 100 * (ours["accepted_per_block"] / theirs["accepted_per_block"] - 1),
            f"agreement_points_{length}": ours["agreement"] - theirs["agreement"],
            f"text_agreement_points_{length}": agreement - other,
        }
    return gain


def _run_s(run: RunFolder) -> float:
    log = run.read_log()
    return float(log[-1]["elapsed_s"]) if log else 0.0
