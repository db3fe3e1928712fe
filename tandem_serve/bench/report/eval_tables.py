"""The report's tables of evaluations: Table 1, acceptance, sweeps, peers, configurations, domains."""

from __future__ import annotations

from typing import Any

from tandem_serve.bench.report import paper
from tandem_serve.bench.report.table import Table

Eval = dict[str, Any]


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


def accepted(figures: dict[str, float], digits: int = 3) -> str:
    """Accepted drafts a block, and how far another sample of prompts would be off (a standard error)."""
    error = figures.get("accepted_per_block_error")  # of a single response nobody knows
    return f"{figures['accepted_per_block']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


_MEASURES = ("accuracy", "cross_entropy", "agreement", "total_variation")
_MEASURE_NAMES = ("accuracy, %", "CE", "agreement, %", "TV")


def _measures(figures: dict[str, float]) -> list[str]:
    digits = {"accuracy": 2, "agreement": 2, "cross_entropy": 3, "total_variation": 3}
    return [f"{figures[name]:.{digits[name]}f}" for name in _MEASURES]


def paper_table_1() -> Table:
    rows = [[paper.TABLE_1_NAMES[key], *_measures(figures)] for key, figures in paper.TABLE_1.items()]
    return Table("The paper's Table 1", ("drafter", *_MEASURE_NAMES), rows, "Block length 2 in training.")


def text_table(name: str, document: Eval) -> Table:
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


def drafting_table(name: str, document: Eval) -> Table:
    rows = []
    for drafter_name, drafter in document["drafters"].items():
        for temperature, drafting in drafter["drafting"].items():
            for length, f in drafting["block_lengths"].items():
                row = [drafter_name, temperature, length, accepted(f), f"{f['agreement']:.2f}"]
                row += [f"{f['primary_runs_per_response']:.2f}", f"{f['drafter_runs_per_response']:.2f}"]
                rows.append([*row, " ".join(f"{x:.2f}" for x in f["accepted_per_position"])])
    columns = ("drafter", "temperature", "block length", "accepted a block", "agreement, %", "ML runs", "MS runs")
    note = f"Responses of {document['plan']['num_tokens']} tokens; runs are per response. ML's count the prompt's pass,"
    note += " MS's do not: a plain or EAGLE-style drafter makes one more for it, a tandem drafter none."
    return Table(f"{name}: the primary's own texts", (*columns, "accepted by position"), rows, note)


def projection_table(name: str, document: Eval) -> Table:
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


def sweep_table(name: str, document: Eval) -> Table:
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


def peers_table(name: str, document: Eval) -> Table:
    """Every kind of drafter side by side, where there is more than plain and tandem."""
    kinds = {drafter["type"] for drafter in document["drafters"].values()}
    rows = []
    for drafter_name, drafter in document["drafters"].items() if kinds - {"plain", "tandem"} else ():
        tokens = drafter.get("training", {}).get("num_tokens") or 0
        for temperature, drafting in drafter["drafting"].items():
            figures = drafting["block_lengths"]
            best = max(figures, key=lambda g: projected_speed(document, figures[g], paper.COST_RATIO))
            row = [drafter_name, drafter["type"], f"{drafter['num_parameters']:,}", f"{tokens:,}", temperature, best]
            row += [accepted(figures[best]), f"{figures[best]['primary_runs_per_response']:.2f}"]
            rows.append([*row, f"{projected_speed(document, figures[best], paper.COST_RATIO):.3f}"])
    columns = ("drafter", "kind", "parameters", "training tokens", "temperature", "best block length")
    more = ("accepted a block", "ML runs", "projected speed-up")
    note = f"Speed-ups are projected: MS {paper.COST_RATIO} times as fast as ML, a verification costs one pass."
    return Table(f"{name}: peers on the same primary and tokens", (*columns, *more), rows, note)


def configurations_table(evals: dict[str, Eval]) -> Table:
    """The paper's three training configurations, where there is more than the frozen one, at the same budget."""
    found = [
        (name, document, drafter_name, drafter, drafter["training"])
        for name, document in evals.items()
        for drafter_name, drafter in document["drafters"].items()
        if drafter["type"] in ("tandem", "deep-tandem") and drafter.get("training", {}).get("train_primary")
    ]
    trained = [_recipe(of_one) for *_, of_one, training in found if training["train_primary"] != "frozen"]
    found.sort(key=lambda of_one: len(of_one[1]["drafters"]))  # what was measured for the comparison comes first
    rows, shown = [], set()
    for name, document, drafter_name, drafter, training in found:
        row_of = (training["train_primary"], _recipe(drafter))
        if _recipe(drafter) in trained and row_of not in shown:
            shown.add(row_of)
            length, text = nearest(drafter["text"]["block_lengths"], paper.TABLE_1_BLOCK_LENGTH)
            _, drafting = nearest(next(iter(drafter["drafting"].values()))["block_lengths"], 5)
            primary = document["primary"]
            row = [name, drafter_name, drafter["type"], training["train_primary"], f"{training['num_tokens']:,}"]
            row += [f"{primary['loss']:.3f}", f"{primary['accuracy']:.2f}", length, *_measures(text)]
            rows.append([*row, accepted(drafting)])
    columns = ("evaluation", "drafter", "kind", "primary", "tokens", "ML's loss", "ML's accuracy, %", "block length")
    title = "Training configurations: primary frozen, trained by the drafter's loss, or by both"
    return Table(title, (*columns, *_MEASURE_NAMES, "accepted a block of 5"), rows)


def _recipe(drafter: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be the same of drafters whose configurations are compared."""
    training = drafter["training"]
    budget = ("num_tokens", "layer_map", "block_lengths", "shape", "init_from", "sampled_tokens")
    loss = ("distillation_weight", "cross_entropy_share")
    return (drafter["type"], *(str(training.get(key)) for key in (*budget, *loss)))


def by_domain(evals: dict[str, Eval]) -> dict[str, Eval]:
    """The evaluations of the same drafters on two or more texts."""
    groups: dict[str, dict[str, Eval]] = {}
    for name, document in evals.items():
        drafters = {drafter_name: drafter["training"] for drafter_name, drafter in document["drafters"].items()}
        if not any("couplings" in drafter for drafter in document["drafters"].values()):
            groups.setdefault(f"{document.get('primary_fingerprint')} {drafters}", {})[name] = document
    with_several = [g for g in groups.values() if len({_text_of(document) for document in g.values()}) > 1]
    return {name: document for group in with_several for name, document in group.items()}


def _text_of(document: Eval) -> str:
    return str(document["plan"]["prompts"] or document["plan"]["data"])


def domains_table(evals: dict[str, Eval]) -> Table:
    rows = []
    for name, document in evals.items():
        for drafter_name, drafter in document["drafters"].items():
            for temperature, drafting in drafter["drafting"].items():
                length, f = nearest(drafting["block_lengths"], 5)
                row = [name, _text_of(document), drafter_name, temperature]
                rows.append([*row, length, accepted(f), f"{f['agreement']:.2f}"])
    columns = ("evaluation", "text", "drafter", "temperature", "block length", "accepted a block", "agreement, %")
    return Table("By domain", columns, rows)


def nearest(block_lengths: dict[str, Any], wanted: int) -> tuple[str, Any]:
    """The figures of blocks of the wanted length, or of the nearest to it."""
    length = min(block_lengths, key=lambda g: abs(int(g) - wanted))
    return length, block_lengths[length]
