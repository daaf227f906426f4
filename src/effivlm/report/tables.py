"""Result tables from records: one row per model and setting, as terminal table, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from effivlm.metrics.generalization import generalization
from effivlm.metrics.intervals import bootstrap_overall, holm, paired_test
from effivlm.metrics.loyalty import loyalty
from effivlm.metrics.performance import MetricError, aggregate_of, overall, task_score, values
from effivlm.records import DocumentRecord


@dataclass(frozen=True)
class Row:
    """One model under one setting.

    Attributes:
        scores: task -> score in percent. op, low, high, ol, og: percent; NaN where undefined.
        visual, visual_mean, prompt_kv: realised shares, mean over documents. kv_bytes: mean per document.
        p: paired test against ``none`` over all documents, Holm-corrected per model. failures: documents without answer.
    """

    model: str
    setting: str
    scores: dict[str, float]
    op: float
    low: float
    high: float
    ol: float
    og: float
    visual: float
    visual_mean: float
    prompt_kv: float
    kv_bytes: float
    p: float
    documents: int
    failures: int


def rows_of(records: Sequence[DocumentRecord], seed: int = 0) -> list[Row]:
    """Rows in order of appearance; only documents that the original model was asked too are compared.

    Raises:
        MetricError: if a model has no records under ``none``.
    """
    groups: dict[str, dict[str, list[DocumentRecord]]] = {}
    for r in records:
        groups.setdefault(r.model, {}).setdefault(r.setting, []).append(r)
    out: list[Row] = []
    for model, settings in groups.items():
        if "none" not in settings:
            raise MetricError(f"{model} has no records under 'none': nothing to compare with")
        base = settings.pop("none")
        rows = [_row(model, s, mine, base, seed) for s, mine in [("none", base), *settings.items()]]
        adjusted = holm([r.p for r in rows[1:]])
        out += [rows[0], *(Row(**{**vars(r), "p": p}) for r, p in zip(rows[1:], adjusted, strict=True))]
    return out


def _row(model: str, setting: str, mine: list[DocumentRecord], base: list[DocumentRecord], seed: int) -> Row:
    a, b = _by_task(mine), _by_task(base)
    pairs = {t: [(x, b[t][d]) for d, x in a[t].items() if d in b[t]] for t in a if t in b}
    pairs = {t: p for t, p in pairs.items() if p}
    scores = {t: task_score([x for x, _ in p]) for t, p in pairs.items()}
    original = {t: task_score([y for _, y in p]) for t, p in pairs.items()}
    rated = [t for t in scores if original[t] > 0]
    op, low, high, og = (float("nan"),) * 4
    if rated:
        op = overall({t: scores[t] for t in rated}, {t: original[t] for t in rated})
        how = {t: aggregate_of(pairs[t][0][0].metric) for t in rated}
        low, high = bootstrap_overall({t: values([x for x, _ in pairs[t]]) for t in rated},
                                      {t: values([y for _, y in pairs[t]]) for t in rated}, how, seed=seed)  # fmt: skip
        og = generalization([{t: scores[t] / original[t] for t in rated}])
    flat = [pair for p in pairs.values() for pair in p]
    p = paired_test([x.score or 0.0 for x, _ in flat], [y.score or 0.0 for _, y in flat], seed=seed)
    shares = [r.cost["realised"] for r in mine if r.cost]
    means = {k: _mean([s[k] for s in shares]) for k in ("visual", "visual_mean", "prompt_kv")}
    return Row(model, setting, {t: 100 * s for t, s in scores.items()}, op, low, high, loyalty(mine, base), og, **means,
               kv_bytes=_mean([r.cost["kv_bytes"] for r in mine if r.cost]), p=p, documents=len(mine),
               failures=sum(r.failed for r in mine))  # fmt: skip


def _by_task(records: Sequence[DocumentRecord]) -> dict[str, dict[str, DocumentRecord]]:
    out: dict[str, dict[str, DocumentRecord]] = {}
    for r in records:
        out.setdefault(r.task, {})[r.document] = r
    return out


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else float("nan")


def header(rows: Sequence[Row]) -> list[str]:
    """Column titles."""
    tasks = list(dict.fromkeys(t for r in rows for t in r.scores))
    return ["model", "setting", *tasks, "OP", "95 %", "OL", "OG", "visual", "visual mean", "KV", "KV kB", "p", "failed"]


def cells(row: Row, tasks: Sequence[str]) -> list[str]:
    """One row as text."""
    shares = [f"{100 * x:.1f} %" for x in (row.visual, row.visual_mean, row.prompt_kv)]
    scores = [f"{row.scores[t]:.1f}" if t in row.scores else "" for t in tasks]
    p = "" if row.setting == "none" else ("<.001" if row.p < 0.001 else f"{row.p:.3f}")
    return [row.model, row.setting, *scores, f"{row.op:.1f}", f"{row.low:.1f}-{row.high:.1f}", f"{row.ol:.1f}", f"{row.og:.1f}", *shares,
            f"{row.kv_bytes / 1000:.1f}", p, f"{row.failures}/{row.documents}"]  # fmt: skip


def terminal(rows: Sequence[Row]) -> list[Table]:
    """One rich table per model: what fits 80 columns; the Markdown and CSV hold every column."""
    shown = {"setting": "setting", "OP": "OP", "95 %": "95 %", "OL": "OL", "visual mean": "visual", "KV": "KV", "p": "p", "failed": "failed"}
    tables = []
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model]
        table = Table(title=f"{model}: quality (OP) and shares really kept, in percent of the uncompressed model", header_style="bold")
        for name, title in shown.items():
            table.add_column(title, justify="left" if name == "setting" else "right", no_wrap=True)
        for row in mine:
            by_title = dict(zip(header([row]), cells(row, list(row.scores)), strict=True))
            table.add_row(*(by_title[n].replace(" %", "%") for n in shown), style="bold" if row.setting == "none" else None)
        tables.append(table)
    return tables


def markdown(rows: Sequence[Row]) -> str:
    """All columns as a Markdown table."""
    titles = header(rows)
    tasks = titles[2 : titles.index("OP")]
    lines = [titles, ["---"] * len(titles), *(cells(r, tasks) for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """All columns with full precision."""
    titles = header(rows)
    tasks = titles[2 : titles.index("OP")]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["model", "setting", *tasks, "op", "op_low", "op_high", "ol", "og", "visual", "visual_mean", "prompt_kv", "kv_bytes", "p",
                     "documents", "failures"])  # fmt: skip
    for r in rows:
        writer.writerow([r.model, r.setting, *(r.scores.get(t, "") for t in tasks), r.op, r.low, r.high, r.ol, r.og, r.visual, r.visual_mean,
                         r.prompt_kv, r.kv_bytes, r.p, r.documents, r.failures])  # fmt: skip
    return out.getvalue()
