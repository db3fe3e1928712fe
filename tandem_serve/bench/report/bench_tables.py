"""The report's tables of what was measured by decoding: speed, engines, policies, standalone text."""

from __future__ import annotations

from typing import Any

from tandem_serve.bench.report import paper
from tandem_serve.bench.report.table import Table, as_cell, records_table


def paper_table_2() -> Table:
    rows = [
        [key, str(n), *(f"{value:.3f}" for value in values)]
        for n, of_n in paper.TABLE_2.items()
        for key, values in of_n.items()
    ]
    rows += [[f"adaptive, {key}", "1", *(f"{v:.3f}" for v in values)] for key, values in paper.ADAPTIVE.items()]
    note = f"Speed-up over ML alone, best block length of each; MS is {paper.COST_RATIO} times as fast as ML."
    return Table("The paper's Table 2 and adaptive block length", ("", "samples", *paper.TABLE_2_DATA), rows, note)


def decodes_table(decodes: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, document in decodes.items():
        options = document["options"]
        for mode, figures in document["modes"].items():
            same = figures.get("identical_prompts")
            row = [name, mode, f"{options.get('inflate', 1)}", f"{options.get('temperature', 0):g}"]
            row += [str(options.get("block_length", "")), f"{figures['tokens_per_s']:.1f}"]
            row += [f"{figures['accepted_per_block']:.2f}", _ratio(document, mode)]
            rows.append([*row, "" if same is None else f"{same}/{document['num_prompts']}"])
    columns = ("benchmark", "mode", "inflated", "temperature", "block length", "tokens/s", "accepted", "over plain")
    return Table("Measured decoding", (*columns, "identical texts"), rows)


def engines_table(documents: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, document in documents.items():
        for concurrency, modes in document["modes"].items():
            for mode, figures in modes.items():
                ratio = document["ratios"].get(f"{mode}/vllm", {}).get(concurrency)
                row = [name, concurrency, mode, f"{document['options']['inflate']}", f"{figures['tokens_per_s']:.1f}"]
                row += [f"{figures['tokens_per_step']:.2f}"]
                row.append(f"{figures['idle_share']:.0%}" if figures["idle_share"] else "")
                rows.append([*row, "" if ratio is None else f"{ratio:.2f}"])
    columns = ("benchmark", "at a time", "mode", "inflated", "tokens/s", "tokens a step", "waits for drafts")
    return Table("Measured engines", (*columns, "over plain vLLM"), rows)


def tandem_over_plain_table(documents: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [name, *load_of(document, cell), cell["best_fixed"], cell["best_fixed_plain"], f"{cell[_OVER_PLAIN]:.3f}"]
        for name, document in documents.items()
        for cell in document["cells"]
        if _OVER_PLAIN in cell
    ]
    columns = ("benchmark", *LOAD, "tandem's best", "plain's best", "tandem over plain")
    return Table(
        "Measured: tandem over the plain drafter, each at its best fixed length (the paper's Table 2)", columns, rows
    )


_OVER_PLAIN = "tandem/plain-drafter"
LOAD = ("inflated", "load", "batch", "n", "temperature")


def load_of(document: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """LOAD of one of a policies document's cells."""
    options = document.get("options", {})
    load = "steady" if options.get("steady") else "together"  # whether places are taken again, or all begin and end
    values = {"inflated": options.get("inflate", 1), "load": load, **cell}
    return [as_cell(values.get(key, "")) for key in LOAD]


def standalone_table(name: str, document: dict[str, Any]) -> Table:
    records = {
        mode: {key: value for key, value in figures.items() if not isinstance(value, dict)}
        for mode, figures in document["modes"].items()
    }
    inflated = document["options"].get("inflate", 1)
    title = (
        f"{name}: standalone, primary inflated {inflated}x (the paper, blocks of 3: 2.75 times ML, 1.16 times Otter)"
    )
    return records_table(title, "writes", records.items())


def _ratio(document: dict[str, Any], mode: str) -> str:
    ratio = document["ratios"].get(f"{mode}/plain")
    return "" if ratio is None else f"{ratio:.3f}"


def router_tables(name: str, document: dict[str, Any]) -> list[Table]:
    predictors = {key: value for key, value in document["calibration"].items() if isinstance(value, dict)}
    calibration = {key: {k: v for k, v in value.items() if k != "bins"} for key, value in predictors.items()}
    policies, title = document.get("policies", {}), f"{name}: policies at thresholds chosen on other texts, replayed"
    return [
        records_table(f"{name}: calibration of each predictor", "predictor", calibration.items()),
        records_table(title, "policy", policies.items(), _REPLAYED),
    ]


_REPLAYED = (
    "Replayed at measured costs of a round, one sequence at a time, greedy and sampled texts together. "
    "What decoding itself gives is in the measured policies."
)


def policies_table(name: str, document: dict[str, Any]) -> Table:
    """Each policy under each load; what is measured of one is flat, but for its spread."""
    records: list[tuple[str, dict[str, Any]]] = []
    for cell in document["cells"]:
        load = {key: value for key, value in cell.items() if not isinstance(value, dict)}
        for policy, figures in cell.get("policies", {}).items():
            flat = {key: value for key, value in figures.items() if not isinstance(value, dict)}
            records.append((policy, {**load, **flat}))
    title = f"{name}: block policies (the paper's adaptive length: 1.045, 1.051, 1.093)"
    return records_table(title, "policy", records)
