"""The report's tables, ours beside the paper's where the paper has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem_serve.bench.report import paper
from tandem_serve.bench.report.documents import Documents

Eval = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text under columns, with a sentence about where they come from."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def all_tables(documents: Documents) -> list[Table]:
    """Those that the documents have something for."""
    tables = [_paper_table_1()] if documents.evals else []
    for name, document in documents.evals.items():
        tables += [_text(name, document), _drafting(name, document), _projected(name, document)]
        tables += [t for t in (_sweep(name, document), _peers(name, document)) if t.rows]
    if len(documents.evals) > 1:
        tables.append(_domains(documents.evals))
    if documents.decodes:
        tables += [_paper_table_2(), _decodes(documents.decodes)]
    tables += [_standalone(name, document) for name, document in documents.standalones.items()]
    tables += [_policies(name, document) for name, document in documents.policies.items()]
    for name, router in documents.routers.items():
        tables += _router(name, router)
    return tables


def role(drafter: dict[str, Any]) -> str:
    """The paper's name for a drafter: plain or tandem (or a peer's kind), trained by CE or by distillation."""
    training = drafter.get("training", {})
    only_ce = training.get("distillation_weight") == 0 or training.get("cross_entropy_share") == 1
    return f"{drafter['type']}-{'ce' if only_ce else 'distil'}"


def trained_lengths(drafter: dict[str, Any]) -> str:
    """The block lengths that a drafter was trained with, as `2` or `1-8`; empty where unknown."""
    low, high = drafter.get("training", {}).get("block_lengths") or ("", "")
    return str(low) if low == high else f"{low}-{high}"


def projected_speed(document: Eval, figures: dict[str, Any], cost_ratio: float) -> float:
    """Over the primary alone, if a verification costs one pass and a draft 1 / cost_ratio of it."""
    passes = figures["primary_runs_per_response"] + figures["drafter_runs_per_response"] / cost_ratio
    return float(document["plan"]["num_tokens"] / passes)


_MEASURES = ("accuracy", "cross_entropy", "agreement", "total_variation")
_MEASURE_NAMES = ("accuracy, %", "CE", "agreement, %", "TV")


def _measures(figures: dict[str, float]) -> list[str]:
    digits = {"accuracy": 2, "agreement": 2, "cross_entropy": 3, "total_variation": 3}
    return [f"{figures[name]:.{digits[name]}f}" for name in _MEASURES]


def _paper_table_1() -> Table:
    rows = [[paper.TABLE_1_NAMES[key], *_measures(figures)] for key, figures in paper.TABLE_1.items()]
    return Table("The paper's Table 1", ("drafter", *_MEASURE_NAMES), rows, "Block length 2 in training.")


def _text(name: str, document: Eval) -> Table:
    rows = []
    for drafter_name, drafter in document["drafters"].items():
        for length, figures in drafter.get("text", {}).get("block_lengths", {}).items():
            counterpart = paper.TABLE_1_NAMES.get(role(drafter), "")
            rows.append([drafter_name, counterpart, f"{drafter['num_parameters']:,}", length, *_measures(figures)])
    primary = document["primary"]
    note = f"{document['plan']['data']}. The primary itself: loss {primary['loss']:.3f}, accuracy"
    note += f" {primary['accuracy']:.2f} %, {primary['num_parameters']:,} parameters."
    columns = ("drafter", "the paper's", "parameters", "block length", *_MEASURE_NAMES)
    return Table(f"{name}: held-out text (Table 1)", columns, rows, note)


def _drafting(name: str, document: Eval) -> Table:
    rows = []
    for drafter_name, drafter in document["drafters"].items():
        for temperature, drafting in drafter["drafting"].items():
            for length, f in drafting["block_lengths"].items():
                row = [drafter_name, temperature, length, f"{f['accepted_per_block']:.3f}", f"{f['agreement']:.2f}"]
                row += [f"{f['primary_runs_per_response']:.2f}", f"{f['drafter_runs_per_response']:.2f}"]
                rows.append([*row, " ".join(f"{x:.2f}" for x in f["accepted_per_position"])])
    columns = ("drafter", "temperature", "block length", "accepted a block", "agreement, %", "ML runs", "MS runs")
    note = f"Responses of {document['plan']['num_tokens']} tokens; runs are per response, the prompt's included."
    return Table(f"{name}: the primary's own texts", (*columns, "accepted by position"), rows, note)


def _projected(name: str, document: Eval) -> Table:
    rows = []
    for drafter_name, drafter in document["drafters"].items():
        for temperature, drafting in drafter["drafting"].items():
            speeds = {
                length: projected_speed(document, f, paper.COST_RATIO)
                for length, f in drafting["block_lengths"].items()
            }
            best = max(speeds, key=lambda length: speeds[length])
            rows.append([drafter_name, temperature, best, f"{speeds[best]:.3f}"])
    note = f"Not a measurement: if MS is {paper.COST_RATIO} times as fast as ML and a verification costs one pass."
    title = f"{name}: projected speed-up over ML alone, best block length of each"
    return Table(title, ("drafter", "temperature", "block length", "speed-up"), rows, note)


def _sweep(name: str, document: Eval) -> Table:
    """Training by inference block length, where several tandem drafters differ in the first."""
    drafters = {n: d for n, d in document["drafters"].items() if d["type"] == "tandem" and trained_lengths(d)}
    lengths = [str(g) for g in document["plan"]["block_lengths"]]
    rows = []
    if len({trained_lengths(d) for d in drafters.values()}) > 1:
        for drafter_name, drafter in drafters.items():
            figures = next(iter(drafter["drafting"].values()))["block_lengths"]
            values = [f"{figures[g]['accepted_per_block']:.2f}" for g in lengths]
            rows.append([drafter_name, trained_lengths(drafter), *values])
    columns = ("drafter", "trained with", *lengths)
    return Table(f"{name}: accepted a block, by block length in training and inference", columns, rows)


def _peers(name: str, document: Eval) -> Table:
    """Every kind of drafter side by side, where there is more than plain and tandem."""
    kinds = {drafter["type"] for drafter in document["drafters"].values()}
    rows = []
    for drafter_name, drafter in document["drafters"].items() if kinds - {"plain", "tandem"} else ():
        figures = next(iter(drafter["drafting"].values()))["block_lengths"]
        best = max(figures, key=lambda g: projected_speed(document, figures[g], paper.COST_RATIO))
        tokens = drafter.get("training", {}).get("num_tokens") or 0
        row = [drafter_name, drafter["type"], f"{drafter['num_parameters']:,}", f"{tokens:,}", best]
        row += [f"{figures[best]['accepted_per_block']:.3f}", f"{figures[best]['primary_runs_per_response']:.2f}"]
        rows.append(row)
    columns = ("drafter", "kind", "parameters", "training tokens", "best block length", "accepted a block", "ML runs")
    return Table(f"{name}: peers on the same primary and tokens", columns, rows)


def _domains(evals: dict[str, Eval]) -> Table:
    rows = []
    for name, document in evals.items():
        for drafter_name, drafter in document["drafters"].items():
            for temperature, drafting in drafter["drafting"].items():
                length, f = middle(drafting["block_lengths"])
                row = [name, document["plan"]["prompts"] or document["plan"]["data"], drafter_name, temperature]
                rows.append([*row, length, f"{f['accepted_per_block']:.3f}", f"{f['agreement']:.2f}"])
    columns = ("evaluation", "text", "drafter", "temperature", "block length", "accepted a block", "agreement, %")
    return Table("By domain", columns, rows)


def middle(block_lengths: dict[str, Any]) -> tuple[str, Any]:
    """The figures of blocks of 5, or of the length nearest to it."""
    length = min(block_lengths, key=lambda g: abs(int(g) - 5))
    return length, block_lengths[length]


def _paper_table_2() -> Table:
    rows = [
        [key, str(n), *(f"{value:.3f}" for value in values)]
        for n, of_n in paper.TABLE_2.items()
        for key, values in of_n.items()
    ]
    rows += [[f"adaptive, {key}", "1", *(f"{v:.3f}" for v in values)] for key, values in paper.ADAPTIVE.items()]
    note = f"Speed-up over ML alone, best block length of each; MS is {paper.COST_RATIO} times as fast as ML."
    return Table("The paper's Table 2 and adaptive block length", ("", "samples", *paper.TABLE_2_DATA), rows, note)


def _decodes(decodes: dict[str, dict[str, Any]]) -> Table:
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


def _standalone(name: str, document: dict[str, Any]) -> Table:
    records = {
        mode: {key: value for key, value in figures.items() if not isinstance(value, dict)}
        for mode, figures in document["modes"].items()
    }
    inflated = document["options"].get("inflate", 1)
    title = (
        f"{name}: standalone, primary inflated {inflated}x (the paper, blocks of 3: 2.75 times ML, 1.16 times Otter)"
    )
    return _records(title, "writes", records)


def _ratio(document: dict[str, Any], mode: str) -> str:
    ratio = document["ratios"].get(f"{mode}/plain")
    return "" if ratio is None else f"{ratio:.3f}"


def _router(name: str, document: dict[str, Any]) -> list[Table]:
    predictors = {key: value for key, value in document["calibration"].items() if isinstance(value, dict)}
    calibration = {key: {k: v for k, v in value.items() if k != "bins"} for key, value in predictors.items()}
    tables = [
        _records(f"{name}: calibration of each predictor", "predictor", calibration),
        _records(f"{name}: policies at their measured thresholds, replayed", "policy", document.get("policies", {})),
    ]
    return [table for table in tables if table.rows]


def _policies(name: str, document: dict[str, Any]) -> Table:
    """Each policy under each load; what is measured of one is flat, but for its spread."""
    records: dict[str, dict[str, Any]] = {}
    for cell in document["cells"]:
        load = {key: value for key, value in cell.items() if not isinstance(value, dict)}
        for policy, figures in cell.get("policies", {}).items():
            flat = {key: value for key, value in figures.items() if not isinstance(value, dict)}
            records[f"{policy} #{len(records) + 1}"] = {**load, **flat}
    return _records(f"{name}: block policies (the paper's adaptive length: 1.045, 1.051, 1.093)", "policy", records)


def _records(title: str, what: str, records: dict[str, dict[str, Any]]) -> Table:
    """Flat records by name, under the keys that any of them has."""
    columns = list(dict.fromkeys(key for record in records.values() for key in record))
    rows = [[name, *(_cell(record.get(key, "")) for key in columns)] for name, record in records.items()]
    return Table(title, (what, *columns), rows)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
